"""turbo_opt's operators: what each computes, and the providers that compute it.

Importing this package registers every `turbo_opt::` operator with torch. It imports neither Triton
nor any other provider, and does not touch a GPU.
"""

from __future__ import annotations

# With a checkout's root on sys.path, `import kernels` finds this folder too, and transformers
# imports a package of that name to read its version. Under that name it stays empty.
if __name__ == "turbo_opt.kernels":
    from .api import *  # noqa: F403
    from .api import __all__ as __all__
