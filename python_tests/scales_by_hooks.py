"""Whether a model with tune's hooks is the one that its scales would be written as."""

import dataclasses
import shutil
from collections.abc import Collection
from pathlib import Path

import torch

from adamix import tuning
from adamix.merging import restored_model
from adamix.storage.file import read_delta, write_delta


def assert_hooks_compute_what_the_scales_do(base: Path, delta: Path, out: Path) -> Collection[str]:
    """For scales far from those of `delta`, which `out` gets; what has such scales."""
    model, found = restored_model(base, delta), read_delta(delta)
    ids = torch.arange(4, 60).view(2, 28)
    before = model(input_ids=ids).logits.double()
    generator = torch.Generator().manual_seed(0)
    with tuning._Trained(model, found) as trained:
        assert torch.equal(model(input_ids=ids).logits, before)
        for logarithm in trained.parameters:
            logarithm.data.normal_(generator=generator)
        hooked, matrices = model(input_ids=ids).logits, trained.result()
    assert torch.equal(model(input_ids=ids).logits, before)
    shutil.copytree(delta, out)
    write_delta(dataclasses.replace(found, matrices=found.matrices | matrices), out)
    written = restored_model(base, out)(input_ids=ids).logits
    assert (hooked - written).norm() < 1e-3 * (before - written).norm()
    return matrices.keys()
