// Compiled once per instruction set, with RMT_ISA naming it: the kernels, and a table of them.
#include "backward.h"
#include "forward.h"

namespace rmt {
namespace RMT_ISA {
namespace {

template <class Engine, class T>
struct With {
  static size_t forward_scratch(const Problem& p, int threads) { return Forward<Engine, T>::scratch(p, threads); }
  static void forward(const Problem& p, const Runtime& rt) { Forward<Engine, T>(p, rt).run(); }
  static size_t backward_scratch(const Problem& p, int threads) { return Backward<Engine, T>::scratch(p, threads); }
  static void backward(const Problem& p, const Runtime& rt) { Backward<Engine, T>(p, rt).run(); }
};

// float16 is computed in float32; bfloat16 too, unless the engine multiplies it.
template <class Bf16Engine>
Kernels table(const char* isa) {
  using F32Engine = VectorEngine<F32>;
#define RMT_BY_TYPE(call)                  \
  switch (p.type) {                        \
    case Type::f32:                        \
      return With<F32Engine, float>::call; \
    case Type::f16:                        \
      return With<F32Engine, f16>::call;   \
    default:                               \
      return With<Bf16Engine, bf16>::call; \
  }
  return {isa, [](const Problem& p, int threads) -> size_t { RMT_BY_TYPE(forward_scratch(p, threads)) },
          [](const Problem& p, const Runtime& rt) -> void { RMT_BY_TYPE(forward(p, rt)) },
          [](const Problem& p, int threads) -> size_t { RMT_BY_TYPE(backward_scratch(p, threads)) },
          [](const Problem& p, const Runtime& rt) -> void { RMT_BY_TYPE(backward(p, rt)) }};
#undef RMT_BY_TYPE
}

}  // namespace

#define RMT_CAT_(a, b) a##b
#define RMT_CAT(a, b) RMT_CAT_(a, b)
#define RMT_STR_(a) #a
#define RMT_STR(a) RMT_STR_(a)

}  // namespace RMT_ISA

#if defined(__AVX512BF16__)
Kernels RMT_CAT(kernels_, RMT_ISA)() { return RMT_ISA::table<RMT_ISA::VectorEngine<RMT_ISA::Bf16>>(RMT_STR(RMT_ISA)); }
Kernels kernels_amx() { return RMT_ISA::table<RMT_ISA::MatrixEngine>("amx"); }
#else
Kernels RMT_CAT(kernels_, RMT_ISA)() { return RMT_ISA::table<RMT_ISA::VectorEngine<RMT_ISA::F32>>(RMT_STR(RMT_ISA)); }
#endif

}  // namespace rmt
