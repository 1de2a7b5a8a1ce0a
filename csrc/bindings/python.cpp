#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>

#include "layout/packed_layout.h"

// adamix._C: packed_layout.h for Python. Nothing is defined here, so nothing can drift.
namespace {

using Counts = std::array<int64_t, adamix::kMaxBits>;

void check_codes(int64_t codes) {
  if (codes < 0)
    throw std::invalid_argument("codes must not be negative, got " + std::to_string(codes));
}

int64_t lane_words(int64_t codes, int bits) {
  check_codes(codes);
  if (bits < 1 || bits > adamix::kMaxBits) {
    throw std::invalid_argument("bits must be 1.." + std::to_string(adamix::kMaxBits) + ", got " +
                                std::to_string(bits));
  }
  return adamix::lane_words(codes, bits);
}

int64_t factor_words(int64_t codes, const Counts& counts) {
  check_codes(codes);
  for (const int64_t count : counts) {
    if (count < 0) {
      throw std::invalid_argument("counts must not be negative, got " + std::to_string(count));
    }
  }
  return adamix::factor_words(codes, counts.data());
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  namespace py = pybind11;
  m.doc() = "The packed layout's constants and sizes, from csrc/layout/packed_layout.h.";
  m.attr("LAYOUT_VERSION") = adamix::kLayoutVersion;
  m.attr("BLOCK_CODES") = adamix::kBlockCodes;
  m.attr("PANEL_CODES") = adamix::kPanelCodes;
  m.attr("MAX_BITS") = adamix::kMaxBits;
  m.attr("TABLE_V_OFFSET") = adamix::kTableVOffset;
  m.attr("TABLE_U_OFFSET") = adamix::kTableUOffset;
  m.attr("TABLE_SCALE_OFFSET") = adamix::kTableScaleOffset;
  m.attr("TABLE_FIRST_V_COUNT") = adamix::kTableFirstVCount;
  m.attr("TABLE_FIRST_U_COUNT") = adamix::kTableFirstUCount;
  m.attr("TABLE_COLUMNS") = adamix::kTableColumns;
  m.def("lane_words", &lane_words, py::arg("codes"), py::arg("bits"),
        "32-bit words of a lane of `codes` codes of `bits` bits. ValueError if bits is not 1..8.");
  m.def("v_words", &factor_words, py::arg("in_features"), py::arg("counts"),
        "Words of V [rank, in]; counts[i] of its rows have width MAX_BITS - i.");
  m.def("u_words", &factor_words, py::arg("out_features"), py::arg("counts"),
        "Words of U [out, rank]; counts[i] of its columns have width MAX_BITS - i.");
}
