"""The page, the picture and the animation that show where a generation computed: `handle.report("out.html")`."""

import sys

from ras_compile.notices import MethodModule

sys.modules[__name__].__class__ = MethodModule
