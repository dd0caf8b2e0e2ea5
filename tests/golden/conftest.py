"""`pytest tests/golden --renew` writes the golden files anew."""


def pytest_addoption(parser):
    parser.addoption("--renew", action="store_true", help="write the golden files anew")
