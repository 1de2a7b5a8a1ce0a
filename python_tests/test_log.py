"""What a compression leaves beside its delta, written and read back."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import compressed_pair
from tiny_models import one_thread as one_thread

from adamix.artifacts import PackedDelta
from adamix.errors import DeltaFileError
from adamix.storage.file import read_delta
from adamix.storage.log import (
    LOG_FILE,
    SPECTRA_FILE,
    TOKENS_FILE,
    MatrixRow,
    Spectrum,
    read_log,
    read_spectra,
    write_log,
    write_spectra,
    write_tokens,
)

V_COUNTS, U_COUNTS = (1, 0, 0, 0, 2, 0, 0, 0), (0, 1, 0, 0, 0, 1, 1, 0)
ROW = MatrixRow("model.layers.3.up.weight", "model.layers.*.up.weight", 64, 48, 3, *V_COUNTS,
                *U_COUNTS, 224, 0.583333, 0.0123457, 1.5)
GOLDEN = (
    "name,kind,out_features,in_features,rank,v_bits_8,v_bits_7,v_bits_6,v_bits_5,v_bits_4,"
    "v_bits_3,v_bits_2,v_bits_1,u_bits_8,u_bits_7,u_bits_6,u_bits_5,u_bits_4,u_bits_3,u_bits_2,"
    "u_bits_1,bytes,bits_per_weight,relative_error,seconds\r\n"
    "model.layers.3.up.weight,model.layers.*.up.weight,64,48,3,1,0,0,0,2,0,0,0,0,1,0,0,0,1,1,0,224,"
    "0.583333,0.0123457,1.5\r\n")


def test_the_log_to_the_letter_and_back(tmp_path):
    write_log(tmp_path, [ROW])
    assert (tmp_path / LOG_FILE).read_bytes().decode() == GOLDEN
    assert read_log(tmp_path) == [ROW]
    assert (ROW.v_counts, ROW.u_counts) == (V_COUNTS, U_COUNTS)


def test_rows_keep_their_order_and_figures_six_digits(tmp_path):
    rows = [replace(ROW, name=f"x,{i}", relative_error=1e-7 * (i + 1) / 3) for i in range(4)]
    write_log(tmp_path, rows)
    read = read_log(tmp_path)
    assert [row.name for row in read] == ["x,0", "x,1", "x,2", "x,3"]
    assert [row.relative_error for row in read] == pytest.approx(
        [row.relative_error for row in rows], rel=1e-5)


def test_a_row_says_what_the_packed_matrix_is():
    words = torch.zeros(2 * (8 + 2 * 4) + 2 * (7 + 3 + 2), dtype=torch.int32)
    packed = PackedDelta(words, torch.ones(3), V_COUNTS, U_COUNTS, (64, 48))
    row = MatrixRow.of(ROW.name, packed, 0.25, 2.0)
    assert (row.kind, row.out_features, row.in_features, row.rank) == (ROW.kind, 64, 48, 3)
    assert (row.v_counts, row.u_counts) == (V_COUNTS, U_COUNTS)
    assert row.bytes == packed.nbytes == 4 * (56 + 3 + 16)
    assert (row.bits_per_weight, row.relative_error, row.seconds) == (8 * 300 / 3072, 0.25, 2.0)


def test_a_compressions_log_has_a_row_a_matrix_that_agrees_with_the_file():
    folder = compressed_pair().delta
    rows, matrices = {row.name: row for row in read_log(folder)}, read_delta(folder).matrices
    assert list(rows) == sorted(matrices)
    for name, packed in matrices.items():
        assert (rows[name].v_counts, rows[name].u_counts) == (packed.v_counts, packed.u_counts)
        assert rows[name].bytes == packed.nbytes
        assert (rows[name].out_features, rows[name].in_features) == packed.shape


@pytest.mark.parametrize("text", [
    None, GOLDEN.replace("rank,", "rang,"), GOLDEN.replace("64,48", "64,x"),
    GOLDEN.rsplit(",", 3)[0], GOLDEN.encode() + b"\xff\xfe"])
def test_a_log_that_is_none_is_refused(tmp_path, text):
    if text is not None:
        (tmp_path / LOG_FILE).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DeltaFileError, match=LOG_FILE) as caught:
        read_log(tmp_path)
    assert "\n" not in str(caught.value)


def test_spectra_round_trip_in_fp32(tmp_path):
    spectra = {f"layers.{i}.w": Spectrum(torch.rand(5 + i).double(), torch.rand(5 + i, 4).double(),
                                         (8, 3, 2)) for i in (10, 9)}
    write_spectra(tmp_path, spectra)
    read = read_spectra(tmp_path)
    assert read.keys() == spectra.keys()
    for name, spectrum in spectra.items():
        assert read[name].widths == (8, 3, 2)
        assert torch.equal(read[name].singular_values, spectrum.singular_values.float())
        assert torch.equal(read[name].errors, spectrum.errors.float())


def test_no_spectra_are_none_and_damaged_ones_are_refused(tmp_path):
    assert read_spectra(tmp_path) == {}
    write_spectra(tmp_path, {"w": Spectrum(torch.ones(2), torch.ones(2, 2), (2,))})
    data = (tmp_path / SPECTRA_FILE).read_bytes()
    (tmp_path / SPECTRA_FILE).write_bytes(data[:-3])
    with pytest.raises(DeltaFileError, match=SPECTRA_FILE):
        read_spectra(tmp_path)


def test_a_compressions_spectra_belong_to_its_plans():
    folder = compressed_pair().delta
    spectra = read_spectra(folder)
    for row in read_log(folder):
        spectrum = spectra[row.name]
        candidates = len(spectrum.singular_values)
        assert spectrum.widths == (8, 4, 3, 2) and row.rank <= candidates
        assert spectrum.errors.shape == (candidates, 5)
        assert (spectrum.errors[:, 0] <= spectrum.errors[:, 3]).all()  # 8 bits lose less than 2


def test_token_ids_are_written_as_int32(tmp_path):
    tokens = torch.tensor([[1, 70_000], [5, 2]])
    write_tokens(tmp_path, tokens.T)  # strided
    written = load_file(tmp_path / TOKENS_FILE)["input_ids"]
    assert written.dtype == torch.int32 and written.tolist() == [[1, 5], [70_000, 2]]
