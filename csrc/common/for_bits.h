#pragma once

#include <type_traits>

namespace adamix {

// Calls body(std::integral_constant<int, bits>{}): the one switch from run-time bits to a template
// argument. Needs 1 <= bits <= 8.
template <typename Body>
auto for_bits(int bits, Body&& body) {
  switch (bits) {
    case 1: return body(std::integral_constant<int, 1>{});
    case 2: return body(std::integral_constant<int, 2>{});
    case 3: return body(std::integral_constant<int, 3>{});
    case 4: return body(std::integral_constant<int, 4>{});
    case 5: return body(std::integral_constant<int, 5>{});
    case 6: return body(std::integral_constant<int, 6>{});
    case 7: return body(std::integral_constant<int, 7>{});
    default: return body(std::integral_constant<int, 8>{});
  }
}

}  // namespace adamix
