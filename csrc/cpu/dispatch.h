// Which instruction set's kernels run: chosen from the processor, restricted by RMT_KERNELS_CPU_ISA or set_isa.
#pragma once

#include <string>
#include <vector>

#include "problem.h"

namespace rmt {

std::vector<std::string> usable_isas();  // best first
const Kernels& kernels();                // of the chosen instruction set
void set_isa(const std::string& name);   // throws std::invalid_argument
Runtime torch_runtime();                 // without scratch

}  // namespace rmt
