"""plots: the bars are the file's bytes, the pictures have the promised size."""

import dataclasses
import shutil
import struct

import pytest
import torch
from tiny_models import compressed_pair

from adamix import plots
from adamix.artifacts import PackedDelta
from adamix.errors import DeltaFileError
from adamix.plots import (
    allocation_figure,
    default_matrix,
    lost_shares,
    plot_delta,
    spectrum_figure,
    width_bytes,
    width_colour,
)
from adamix.storage.file import read_delta
from adamix.storage.log import read_spectra

COUNTS_BYTES = 64  # a matrix's row in the file's table, which no width owns


def png_size(path):
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", header[16:24])


def test_both_pictures_are_written_1600_pixels_wide(tmp_path):
    written = plot_delta(compressed_pair().delta, tmp_path / "new" / "folder")
    assert [path.name for path in written] == ["bits_by_layer.png", "singular_values.png"]
    for path in written:
        width, height = png_size(path)
        assert width == plots.PIXELS == 1600 and 600 < height < 2000
        assert path.stat().st_size > 20_000


def test_a_png_gets_the_bits_by_layer_alone(tmp_path):
    assert plot_delta(compressed_pair().delta, tmp_path / "bits.png") == [tmp_path / "bits.png"]
    assert [path.name for path in tmp_path.iterdir()] == ["bits.png"]


def test_the_bytes_of_the_widths_are_those_of_the_matrix():
    for packed in read_delta(compressed_pair().delta).matrices.values():
        assert sum(width_bytes(packed).values()) == packed.nbytes - COUNTS_BYTES


def test_a_scale_goes_with_its_row_of_v():
    v_counts, u_counts = (0, 0, 0, 2, 0, 1, 0, 0), (0, 0, 0, 0, 1, 2, 0, 0)
    words = torch.zeros(3 * (5 + 5 + 3) + 2 * (4 + 3 + 3), dtype=torch.int32)  # 70 and 40 codes
    packed = PackedDelta(words, torch.ones(3), v_counts, u_counts, (40, 70))
    assert width_bytes(packed) == {5: 4 * 2 * (3 * 5 + 1), 4: 4 * 2 * 4,
                                   3: 4 * (3 * 3 + 1) + 4 * 2 * 2 * 3}
    assert sum(width_bytes(packed).values()) == packed.nbytes - COUNTS_BYTES


def test_bars_stack_to_the_bytes_of_each_layer():
    delta = read_delta(compressed_pair().delta)
    figure = allocation_figure(delta)
    titles = [axis.get_title(loc="left") for axis in figure.axes]
    assert len(titles) == 9 and titles[0] == "attention query (q)" and titles[-1] == "output head"
    down = figure.axes[titles.index("MLP down")]
    for layer in (0, 1):
        bars = [bar for bar in down.patches if abs(bar.get_x() + bar.get_width() / 2 - layer) < 0.1]
        tops = [bar.get_y() + bar.get_height() for bar in bars]
        bytes_ = delta.matrices[f"model.layers.{layer}.mlp.down_proj.weight"].nbytes - COUNTS_BYTES
        assert sum(bar.get_height() for bar in bars) * 1024 == pytest.approx(bytes_)
        assert max(tops) * 1024 == pytest.approx(bytes_)  # none hides another
    shown = sum(bar.get_height() for axis in figure.axes for bar in axis.patches) * 1024
    assert shown == pytest.approx(sum(p.nbytes - COUNTS_BYTES for p in delta.matrices.values()))


def test_one_legend_names_each_width_once():
    figure = allocation_figure(read_delta(compressed_pair().delta))
    labels = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    assert labels == ["8 bits", "4 bits", "3 bits", "2 bits"]
    assert len({width_colour(bits) for bits in range(1, 9)}) == 8


def test_no_text_leaves_the_picture_or_lies_on_another():
    pair = compressed_pair()
    spectra = read_spectra(pair.delta)
    name = default_matrix(list(spectra))
    for figure in (allocation_figure(read_delta(pair.delta)), spectrum_figure(name, spectra[name])):
        figure.canvas.draw()
        boxes = [text.get_window_extent() for text in figure.texts]
        boxes += [axis.title.get_window_extent() for axis in figure.axes if axis.title.get_text()]
        boxes += [axis.get_tightbbox() for axis in figure.axes]
        boxes += [legend.get_window_extent() for legend in figure.legends]
        for i, box in enumerate(boxes):
            assert box.x0 >= 0 and box.y0 >= 0, i
            assert box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, i
            assert not any(box.overlaps(other) for other in boxes[i + 1 :]), i


def test_a_delta_without_compressed_matrices_still_draws():
    delta = read_delta(compressed_pair().delta)
    allocation_figure(dataclasses.replace(delta, matrices={})).canvas.draw()


def test_energy_times_lost_share_is_the_simulated_error():
    spectrum = read_spectra(compressed_pair().delta)["model.layers.1.self_attn.q_proj.weight"]
    energy, shares = lost_shares(spectrum)
    assert shares.shape == (len(energy), 4)
    torch.testing.assert_close(energy[:, None] * shares, spectrum.errors[:, :-1].double())
    means = shares.mean(dim=0)
    assert (means.diff() > 0).all()  # widths fall, so losses rise
    figure = spectrum_figure("model.layers.1.self_attn.q_proj.weight", spectrum)
    left, right = figure.axes
    assert len(left.lines) == 5 and left.get_yscale() == right.get_yscale() == "log"
    assert [bar.get_height() for bar in right.patches] == pytest.approx(means.flip(0).tolist())


def test_the_last_query_projection_is_shown_unless_another_is_asked_for(tmp_path):
    folder = compressed_pair().delta
    names = list(read_spectra(folder))
    assert default_matrix(names) == "model.layers.1.self_attn.q_proj.weight"
    assert default_matrix(["h.2.c_attn.weight", "h.10.c_attn.weight"]) == "h.10.c_attn.weight"
    with pytest.raises(DeltaFileError, match="no singular values of nothing"):
        plot_delta(folder, tmp_path, matrix="nothing")
    default = plot_delta(folder, tmp_path / "a")[1].read_bytes()
    other = plot_delta(folder, tmp_path / "b", matrix="lm_head.weight")[1].read_bytes()
    assert default != other


def test_without_spectra_only_the_bits_by_layer_are_drawn(tmp_path):
    shutil.copytree(compressed_pair().delta, tmp_path / "delta")
    (tmp_path / "delta/spectra.safetensors").unlink()
    assert len(plot_delta(tmp_path / "delta", tmp_path / "pictures")) == 1
