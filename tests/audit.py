"""Known vulnerabilities of what is installed, where pip-audit and its database can be reached: `make audit`."""

from __future__ import annotations

import json
import subprocess
import sys


def main() -> int:
    command = [sys.executable, "-m", "pip_audit", "--format", "json", "--progress-spinner", "off", "--skip-editable"]
    found = subprocess.run(command, capture_output=True, text=True)
    try:
        packages = json.loads(found.stdout)["dependencies"]
    except ValueError:
        print("not audited: pip-audit is not installed, or cannot reach its database")
        print(*found.stderr.strip().splitlines()[-1:])
        return 0
    bad = [package for package in packages if package.get("vulns")]
    for package in bad:
        print(package["name"], package["version"], *(known["id"] for known in package["vulns"]))
    print(f"{len(packages)} packages, {len(bad)} with known vulnerabilities")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
