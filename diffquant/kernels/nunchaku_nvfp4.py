"""SVDQuant NVFP4 products by the compiled operators of Nunchaku, for files that it packed.

Built for sm120 and sm121 alone; elsewhere, datacenter Blackwell included, the kernel traps. The
contract of the operators is in `_nunchaku.py`. Not run on hardware.
"""

from functools import partial

from diffquant.kernels import Kernel, Needs
from diffquant.kernels._nunchaku import FUSES, build, prepare, restore
from diffquant.plan import Role

KERNEL = Kernel(
    rank=20,
    needs=Needs(
        encodings=frozenset({"nvfp4"}),
        options=frozenset({"outer=none"}),
        scales=frozenset({Role.BLOCK_SCALE, Role.TENSOR_SCALE, Role.CHANNEL_SCALE}),
        activations=frozenset({"nvfp4;outer=none:group16:dynamic"}),
        layouts=frozenset({"nunchaku_mma"}),
        devices=frozenset({"cuda"}),
        sm=(120, 122),
        multiple_of_N=128,
        multiple_of_K=128,
        packages=("nunchaku",),
    ),
    build=partial(build, fp4=True),
    fuses=FUSES,
    prepare=prepare,
    restore=restore,
    untried=True,
)
