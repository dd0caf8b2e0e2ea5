"""The folder's bare name belongs to another package: what finds it by that name must not disturb the operators."""

import subprocess
import sys


def test_a_bare_import_registers_nothing(request):
    code = """
import sys
sys.path.insert(0, ".")
import torch, ras_compile.kernels
op = torch.ops.ras_compile.scatter_linear.default
import kernels
try:
    import kernels.grouped
except ModuleNotFoundError:
    pass
assert kernels.__file__ == ras_compile.kernels.__file__ and not hasattr(kernels, "scatter_linear")
assert torch.ops.ras_compile.scatter_linear.default is op
assert not [name for name in sys.modules if name.startswith("kernels.")]
"""
    subprocess.run([sys.executable, "-P", "-c", code], cwd=request.config.rootpath, check=True)
