#include "dispatch.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/Utils.h>
#include <ATen/native/CPUBlas.h>

#include "isas.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace rmt {

#define RMT_DECLARE(isa) Kernels kernels_##isa();
RMT_FOR_ISAS(RMT_DECLARE)
#if defined(RMT_HAS_avx512bf16)
Kernels kernels_amx();
#endif

namespace {

constexpr const char* kEmulated = "amx_emulated";

// AMX with bfloat16, and leave of the operating system to use it.
bool matrix_unit() {
#if defined(__x86_64__)
  unsigned a, b, c, d;
  constexpr unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & amx_bf16) && (d & amx_tile) && at::cpu::init_amx();
#else
  return false;
#endif
}

bool supported(const std::string& isa) {
#if defined(__x86_64__)
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (isa == "amx") return bf16 && matrix_unit() && at::native::cpublas::could_pack(at::kBFloat16);
  if (isa == kEmulated) return bf16;
  if (isa == "avx512bf16") return bf16;
  if (isa == "avx512") return avx512;
  if (isa == "avx2")
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
  return isa == "baseline";
}

std::vector<Kernels> usable() {
  std::vector<Kernels> found;
  const auto offer = [&](Kernels k) {
    if (supported(k.isa)) found.push_back(k);
  };
#if defined(RMT_HAS_avx512bf16)
  offer(kernels_amx());
#endif
#define RMT_OFFER(isa) offer(kernels_##isa());
  RMT_FOR_ISAS(RMT_OFFER)
#if defined(RMT_HAS_avx512bf16)
  // For tests: the same kernels over a plain product, on processors without the matrix unit.
  Kernels emulated = kernels_amx();
  emulated.isa = kEmulated;
  offer(emulated);
#endif
  return found;
}

const std::vector<Kernels>& all() {
  static const std::vector<Kernels> found = usable();
  return found;
}

size_t find(const std::string& name) {
  std::string accepted;
  for (size_t i = 0; i < all().size(); ++i) {
    if (all()[i].isa == name) return i;
    accepted += (i ? ", " : "") + std::string(all()[i].isa);
  }
  throw std::invalid_argument("RMT_KERNELS_CPU_ISA: '" + name +
                              "' is not usable on this processor; accepted: " + accepted);
}

std::atomic<int>& chosen() {
  static std::atomic<int> index = [] {
    const char* wanted = std::getenv("RMT_KERNELS_CPU_ISA");
    return wanted && *wanted ? static_cast<int>(find(wanted)) : 0;
  }();
  return index;
}

void parallel(int threads, int count, void (*body)(void*, int, int), void* context) {
  std::atomic<int> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread)
      for (int item = next++; item < count; item = next++) body(context, item, static_cast<int>(thread));
  });
}

void brgemm(int m, int n, int k, int lda, int ldb, int ldc, bool add, const uint16_t* a, const uint16_t* b, float* c) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, reinterpret_cast<const at::BFloat16*>(a),
                              reinterpret_cast<const at::BFloat16*>(b), c);
}
void brgemm_release() { at::native::cpublas::brgemm_release(); }

void plain_brgemm(int m, int n, int k, int lda, int ldb, int ldc, bool add, const uint16_t* a, const uint16_t* b,
                  float* c) {
  if (n > ldb || ldb > 64 || ldb % 16 || k % 2) throw std::logic_error("brgemm cannot take these sizes");
  const auto* aw = reinterpret_cast<const at::BFloat16*>(a);
  const auto* bw = reinterpret_cast<const at::BFloat16*>(b);
  for (int i = 0; i < m; ++i)
    for (int j = 0; j < n; ++j) {
      float sum = add ? c[i * ldc + j] : 0.0f;
      for (int x = 0; x < k; ++x)
        sum += static_cast<float>(aw[i * lda + x]) * static_cast<float>(bw[(x / 2 * ldb + j) * 2 + x % 2]);
      c[i * ldc + j] = sum;
    }
}

}  // namespace

std::vector<std::string> usable_isas() {
  std::vector<std::string> names;
  for (const Kernels& k : all()) names.emplace_back(k.isa);
  return names;
}
const Kernels& kernels() { return all()[chosen()]; }
void set_isa(const std::string& name) { chosen() = static_cast<int>(find(name)); }
Runtime torch_runtime() {
  if (kernels().isa == kEmulated) return {at::get_num_threads(), parallel, plain_brgemm, [] {}, nullptr};
  return {at::get_num_threads(), parallel, brgemm, brgemm_release, nullptr};
}

}  // namespace rmt
