"""compress on a GPU: the same bytes every time, an error like the CPU's; devices not here."""

import pytest
import torch
from conftest import skip_without_cuda
from safetensors.torch import load_file
from tiny_models import VARIANTS, compressed_pair, make_pair
from tiny_models import one_thread as one_thread

from adamix.config import Config
from adamix.devices import CPU, find_compute, matrix_device_bytes
from adamix.errors import DeviceError
from adamix.pipeline import compress

CONFIG = Config(bits_per_weight=3.0, bit_widths=(8, 4, 3, 2), calibration_sequences=8,
                calibration_length=32)  # what compressed_pair() does


def test_the_cpu_computes_in_fp32_whatever_the_models_type():
    assert find_compute("cpu", [torch.bfloat16]) == CPU
    assert (CPU.dtype, CPU.is_cuda, CPU.label) == (torch.float32, False, "cpu")


@pytest.mark.parametrize("device", ["cuda:99", "mps", "nonsense"])
def test_a_device_that_is_not_here_is_one_sentence(device, tmp_path):
    base, finetuned = make_pair(tmp_path)
    with pytest.raises(DeviceError) as caught:
        compress(base, finetuned, tmp_path / "d", CONFIG, device=device)
    assert "\n" not in str(caught.value) and device in str(caught.value)
    assert not (tmp_path / "d").exists()


def test_a_matrix_takes_more_of_a_gpu_the_larger_it_is():
    config = Config(ratio=16)
    sizes = [matrix_device_bytes(shape, 2, config.budget_bits(shape), config)
             for shape in ((512, 512), (512, 2048), (2048, 2048))]
    assert sizes == sorted(sizes) and sizes[0] > 32 * 512**2


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_gpu_writes_the_same_bytes_every_time_and_an_error_like_the_cpus(tmp_path, variant):
    skip_without_cuda("gptq", "search_scales", "pack")
    pair = compressed_pair(variant)
    errors = {}
    for name, device in (("one", "cuda"), ("other", "cuda"), ("cpu", "cpu")):
        errors[name] = compress(pair.base, pair.finetuned, tmp_path / name, CONFIG,
                                device=device).relative_error
    first, second = (load_file(tmp_path / name / "delta.safetensors") for name in ("one", "other"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert errors["one"] == errors["other"] == pytest.approx(errors["cpu"], rel=0.05)
