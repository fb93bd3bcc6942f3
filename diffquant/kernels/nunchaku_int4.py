"""SVDQuant INT4 products by the compiled operators of Nunchaku, for files that it packed.

INT4 tensor cores are those of sm75 to sm89; Hopper and Blackwell have none. Turing is left out: it
computes in float16 only. The contract of the operators is in `_nunchaku.py`. Not run on hardware.
"""

from functools import partial

from diffquant.kernels import Kernel, Needs
from diffquant.kernels._nunchaku import FUSES, build, prepare, restore
from diffquant.plan import Role

KERNEL = Kernel(
    rank=20,
    needs=Needs(
        encodings=frozenset({"int4"}),
        options=frozenset({"group=64"}),
        scales=frozenset({Role.BLOCK_SCALE}),
        activations=frozenset({"int4:group64:dynamic"}),
        layouts=frozenset({"nunchaku_mma"}),
        devices=frozenset({"cuda"}),
        sm=(80, 90),
        multiple_of_N=128,
        multiple_of_K=128,
        packages=("nunchaku",),
    ),
    build=partial(build, fp4=False),
    fuses=FUSES,
    prepare=prepare,
    restore=restore,
    untried=True,
)
