// The kernels that were compiled, and which of them serves a call.
#include "instances.h"
#include "kernels.h"

namespace rmt {

#define RMT_DECLARE(element, width)   \
  Pass forward_##element##_##width(); \
  Pass decode_##element##_##width();  \
  Pass backward_##element##_##width();
RMT_FOR_INSTANCES(RMT_DECLARE)
#undef RMT_DECLARE

namespace {

constexpr Type BF16_type = Type::bf16, F16_type = Type::f16;

}  // namespace

const std::vector<Kernels>& every_kernels() {
#define RMT_LIST(element, width) \
  {element##_type, width, forward_##element##_##width(), decode_##element##_##width(), backward_##element##_##width()},
  static const std::vector<Kernels> every = {RMT_FOR_INSTANCES(RMT_LIST)};
#undef RMT_LIST
  return every;
}

const Kernels* find_kernels(Type type, int head_dim) {
  const Kernels* found = nullptr;
  for (const Kernels& kernels : every_kernels())
    if (kernels.type == type && head_dim <= kernels.width && (found == nullptr || kernels.width < found->width))
      found = &kernels;
  return found;
}

}  // namespace rmt
