// In the place of an instruction set that was left out of the build (-Dcpu_isas).
#include "device.hpp"

namespace ponder::cpu::PONDER_ISA {

extern const Isa isa;
constexpr Isa isa = {PONDER_TEXT(PONDER_ISA), nullptr, 0};

} // namespace ponder::cpu::PONDER_ISA
