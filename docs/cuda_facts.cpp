// What make_cuda_pictures.py draws, asked of the kernels' own code: tiles and shared memory from csrc/cuda/configs.h,
// where an element lies from csrc/cuda/tile.h, and which lane holds what of a product, by running one on the emulated
// GPU. With arguments, tiles of keys and heads and bytes of a head, it tells the order in which blocks of a backward
// pass begin where the L2 cache has 50 MiB: [tile, head, tile, head, ...].
//   g++ -std=c++20 -O1 -DRMT_EMULATED -DRMT_ELEMENT=BF16 -DRMT_WIDTH=64 docs/cuda_facts.cpp csrc/cuda/emulation/*.cpp
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "../csrc/cuda/backward.cu"

namespace {

using namespace rmt;

// One JSON document, written piece by piece: a comma before each but the first of a list.
bool first = true;
void comma() {
  if (!first) std::printf(",");
  first = false;
}
template <class Write>
void list(const std::string& name, Write write) {
  comma();
  std::printf("\n\"%s\": [", name.c_str());
  first = true;
  write();
  std::printf("]");
  first = false;
}
void number(int64_t n) {
  comma();
  std::printf("%lld", static_cast<long long>(n));
}

// `blocks` are those of an SM that the table asks for, `stages` and `chunk` what only decoding has.
template <class Config>
void tiles(const char* kernel, const char* length, int blocks, int stages = 0, int chunk = 0) {
  comma();
  std::printf("\n{\"kernel\": \"%s\", \"length\": \"%s\", \"width\": %d, \"dropout\": %d, ", kernel, length,
              Config::kWidth, Config::kDropout);
  std::printf("\"rows\": %d, \"keys\": %d, \"warps\": %d, \"bytes\": %d, ", Config::kRows, Config::kKeys,
              Config::kWarps, Config::kShared);
  std::printf("\"blocks\": %d, \"stages\": %d, \"chunk\": %d}", blocks, stages, chunk);
}

template <int kWidth, bool kDropout>
void table() {
  using T = Tiles<BF16, kWidth, kDropout>;
  tiles<typename T::Long>("forward", "long", T::Long::kBlocks);
  tiles<typename T::Short>("forward", "short", T::Short::kBlocks);
  tiles<typename T::Few>("decode", "few", T::Few::kBlocks, T::Few::kStages, T::Few::kChunk);
  tiles<typename T::LongBack>("backward", "long", 1);
  tiles<typename T::ShortBack>("backward", "short", 1);
}

// The first address of every chunk of eight rows, from 0 on.
template <int kWidth>
void chunks() {
  for (int row = 0; row < 8; ++row)
    for (int chunk = 0; chunk < Tile<kWidth>::kChunks; ++chunk) number(Tile<kWidth>::chunk_at(0, row, chunk));
}

constexpr int kWidth = RMT_WIDTH;
struct Held {
  std::vector<int> a, b, c;
};

// A warp reads 16 rows whose elements are their own numbers, 64 * row + column, and multiplies: row m by column n is
// 8m + n.
RMT_KERNEL(32, 1) hold(Held* held) {
  using namespace device;
  const Shared numbers = shared_memory(), left = numbers + Tile<kWidth>::bytes(16),
               right = left + Tile<kWidth>::bytes(16);
  const int lane = thread();
  for (int row = 0; row < 16; ++row) {
    const int column = 2 * lane;
    const auto put = [&](Shared tile, uint32_t word) { store_shared(Tile<kWidth>::word_at(tile, row, column), word); };
    put(numbers, static_cast<uint32_t>(kWidth * row + column) * 0x10001u + 0x10000u);
    put(left, column == 0 ? pack<BF16>(static_cast<float>(8 * row), 1.0f) : 0);
    put(right, column == 0 ? pack<BF16>(1.0f, static_cast<float>(row)) : 0);
  }
  barrier();
  uint32_t a[4], b[4], x[4], y[4];
  Reader<kWidth>::a(numbers).read(a, 0, 0), Reader<kWidth>::b(numbers).read(b, 0, 0);
  Reader<kWidth>::a(left).read(x, 0, 0), Reader<kWidth>::b(right).read(y, 0, 0);
  float c[4] = {};
  multiply<BF16>(c, x, y[0], y[1]);
  for (int i = 0; i < 4; ++i) {
    for (int half = 0; half < 2; ++half) {
      held->a[static_cast<size_t>(8 * lane + 2 * i + half)] = static_cast<int>(a[i] >> 16 * half & 0xffff);
      held->b[static_cast<size_t>(8 * lane + 2 * i + half)] = static_cast<int>(b[i] >> 16 * half & 0xffff);
    }
    held->c[static_cast<size_t>(4 * lane + i)] = static_cast<int>(c[i]);
  }
}

void order(int tiles, int heads, int64_t bytes) {
  const Schedule schedule = Schedule::of(tiles, heads, 50 << 20, bytes);
  for (int block = 0; block < schedule.blocks(); ++block) {
    const auto place = schedule.place(block);
    number(place.tile), number(place.head);
  }
}

void layout_of_operands() {
  Held held{std::vector<int>(256), std::vector<int>(256), std::vector<int>(128)};
  device::launch(hold, 1, 32, 3 * Tile<kWidth>::bytes(16), 0, &held);
  list("chunks", [] { chunks<kWidth>(); });
  for (const auto& [name, numbers] : {std::pair{"a", &held.a}, {"b", &held.b}, {"c", &held.c}})
    list(name, [numbers = numbers] {
      for (const int n : *numbers) number(n);
    });
}

}  // namespace

int main(int count, char** arguments) {
  std::printf("{");
  if (count == 4) {
    const auto argument = [&](int i) { return std::atoi(arguments[i]); };
    list("order", [&] { order(argument(1), argument(2), argument(3)); });
  } else {
    list("tiles", [] { table<64, false>(), table<64, true>(), table<128, false>(), table<128, true>(); });
    layout_of_operands();
  }
  std::printf("}\n");
}
