// The forward pass for one element and width.
#include "configs.h"
#include "instance.h"
#include "kernels.h"

namespace rmt {
namespace {

using Element = RMT_ELEMENT;
template <bool dropout>
using Rows = Tiles<Element, RMT_WIDTH, dropout>;

template <class Config>
void start(const Problem& p, const Chip& chip, uintptr_t stream) {
  const int rows = p.queries * p.group(), tiles = (rows + Config::kRows - 1) / Config::kRows;
  const int heads = p.batch * p.kv_heads;
  const int64_t bytes = 4 * static_cast<int64_t>(p.keys) * p.head_dim;  // keys and values
  const Schedule schedule = Schedule::of(tiles, heads, chip.l2_bytes, bytes);
  device::launch(forward_kernel<Config>, schedule.blocks(), Config::kThreads, Config::kShared, stream, p,
                 Scale::of(p), Divisor(p.group()), schedule);
}

template <bool dropout>
void choose(const Problem& p, const Chip& chip, uintptr_t stream) {
  if (p.queries * p.group() <= kShortRows) return start<typename Rows<dropout>::Short>(p, chip, stream);
  start<typename Rows<dropout>::Long>(p, chip, stream);
}

size_t workspace(const Problem&) { return 0; }

void run(const Problem& p, const Chip& chip, char*, uintptr_t stream) {
  p.dropout.on() ? choose<true>(p, chip, stream) : choose<false>(p, chip, stream);
}

template <class... Configs>
void allow_each() {
  (device::allow_shared_memory(forward_kernel<Configs>, Configs::kShared), ...);
}
void allow() { allow_each<Rows<false>::Long, Rows<false>::Short, Rows<true>::Long, Rows<true>::Short>(); }

}  // namespace

Pass RMT_INSTANCE(forward)() {
  return {workspace, run, allow, std::max(Rows<false>::Long::kShared, Rows<true>::Long::kShared)};
}

}  // namespace rmt
