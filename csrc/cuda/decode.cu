// The forward pass of few rows for one element and width.
#include "configs.h"
#include "instance.h"
#include "kernels.h"

namespace rmt {
namespace {

using Element = RMT_ELEMENT;
template <bool dropout>
using Config = typename Tiles<Element, RMT_WIDTH, dropout>::Few;
constexpr int kChunk = Config<false>::kChunk, kRows = Config<false>::kRows;

Parts parts_of(const Problem& p, Pieces& pieces) {
  Parts parts{nullptr, nullptr, nullptr, std::max(1, (p.keys + kChunk - 1) / kChunk)};
  if (parts.chunks == 1) return parts;
  const int64_t count = static_cast<int64_t>(p.batch) * p.heads * p.queries * parts.chunks;
  parts.sums = pieces.take<float>(count * RMT_WIDTH);
  parts.highest = pieces.take<float>(count), parts.totals = pieces.take<float>(count);
  return parts;
}

size_t workspace(const Problem& p) {
  Pieces count;
  parts_of(p, count);
  return count.used();
}

template <class Config>
void start(const Problem& p, const Parts& parts, const Scale& scale, uintptr_t stream) {
  const int tiles = (p.queries * p.group() + kRows - 1) / kRows;
  device::launch(decode_kernel<Config>, p.batch * p.kv_heads * tiles * parts.chunks, Config::kThreads, Config::kShared,
                 stream, p, scale, Divisor(p.group()), parts, tiles);
}

void run(const Problem& p, const Chip&, char* workspace, uintptr_t stream) {
  Pieces pieces(workspace);
  const Parts parts = parts_of(p, pieces);
  const Scale scale = Scale::of(p);
  p.dropout.on() ? start<Config<true>>(p, parts, scale, stream) : start<Config<false>>(p, parts, scale, stream);
  if (parts.chunks == 1) return;
  constexpr int kAtOnce = kCombineThreads / 32;
  const int64_t rows = static_cast<int64_t>(p.batch) * p.heads * p.queries;
  device::launch(combine_kernel<Element, RMT_WIDTH>, static_cast<int>((rows + kAtOnce - 1) / kAtOnce), kCombineThreads,
                 0, stream, p, scale, parts);
}

void allow() {
  device::allow_shared_memory(decode_kernel<Config<false>>, Config<false>::kShared);
  device::allow_shared_memory(decode_kernel<Config<true>>, Config<true>::kShared);
  device::allow_shared_memory(combine_kernel<Element, RMT_WIDTH>, 0);
}

}  // namespace

Pass RMT_INSTANCE(decode)() { return {workspace, run, allow, Config<true>::kShared}; }

}  // namespace rmt
