"""What a process of Ray's makes of its machine before it loads: the folder, the threads, the silence."""

import os
from pathlib import Path

import torch

from diffquant.attach import hush


def settle(folder: str, threads: int) -> None:
    """Take up the folder in which paths were typed, where the machine has it, and torch's threads on a
    CPU, of which Ray leaves one; nobody watches bars here."""
    if Path(folder).is_dir():
        os.chdir(folder)
    torch.set_num_threads(threads)
    hush()
