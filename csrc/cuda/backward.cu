// The backward pass for one element and width.
#include "configs.h"
#include "instance.h"
#include "kernels.h"

namespace rmt {
namespace {

using Element = RMT_ELEMENT;
template <bool dropout>
using Rows = Tiles<Element, RMT_WIDTH, dropout>;
constexpr int kRows = Rows<false>::LongBack::kRows;
static_assert(kRows == Rows<false>::ShortBack::kRows, "one size of tiles, for one workspace");

bool is_short(const Problem& p) { return p.queries * p.group() <= kShortRows; }

BackwardSpace space_of(const Problem& p, Pieces& pieces) {
  const int64_t tiles = (static_cast<int64_t>(p.queries) * p.group() + kRows - 1) / kRows;
  const int64_t samples = p.batch * tiles, units = samples * p.kv_heads;
  BackwardSpace space{};
  space.tiles = static_cast<int>(tiles);
  space.numbers = pieces.take<float>(units * 2 * kRows), space.rows = pieces.take<int>(samples * 5 * kRows);
  space.views = pieces.take<int>(samples * kViewInts), space.turns = pieces.take<int>(units);
  space.tickets = pieces.take<int>(1), space.sums = pieces.take<float>(units * kRows * RMT_WIDTH);
  return space;
}

size_t workspace(const Problem& p) {
  Pieces count;
  space_of(p, count);
  return count.used();
}

template <class Config>
void start(const Problem& p, const Chip& chip, const BackwardSpace& space, uintptr_t stream) {
  const int heads = p.batch * p.kv_heads;
  const Divisor group(p.group());
  device::launch(prepare_kernel<Element, Config::kRows, Config::kKeys>, std::max(1, heads * space.tiles),
                 kPrepareThreads, 0, stream, p, group, space);
  // A head's rows: query, grad_out, and what was summed of the gradient.
  const int64_t bytes = 8 * static_cast<int64_t>(space.tiles) * Config::kRows * p.head_dim;
  const Schedule schedule = Schedule::of((p.keys + Config::kKeys - 1) / Config::kKeys, heads, chip.l2_bytes, bytes);
  if (schedule.blocks() > 0)
    device::launch(backward_kernel<Config>, schedule.blocks(), Config::kThreads, Config::kShared, stream, p,
                   Scale::of(p), group, space, schedule);
}

template <bool dropout>
void choose(const Problem& p, const Chip& chip, const BackwardSpace& space, uintptr_t stream) {
  if (is_short(p)) return start<typename Rows<dropout>::ShortBack>(p, chip, space, stream);
  start<typename Rows<dropout>::LongBack>(p, chip, space, stream);
}

void run(const Problem& p, const Chip& chip, char* workspace, uintptr_t stream) {
  Pieces pieces(workspace);
  const BackwardSpace space = space_of(p, pieces);
  p.dropout.on() ? choose<true>(p, chip, space, stream) : choose<false>(p, chip, space, stream);
}

template <class... Configs>
void allow_each() {
  (device::allow_shared_memory(backward_kernel<Configs>, Configs::kShared), ...);
  (device::allow_shared_memory(prepare_kernel<Element, Configs::kRows, Configs::kKeys>, 0), ...);
}
void allow() {
  allow_each<Rows<false>::LongBack, Rows<false>::ShortBack, Rows<true>::LongBack, Rows<true>::ShortBack>();
}

}  // namespace

Pass RMT_INSTANCE(backward)() { return {workspace, run, allow, Rows<true>::LongBack::kShared}; }

}  // namespace rmt
