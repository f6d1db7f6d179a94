// The module rmt_kernels._cpu: tensors in, tensors out. Shapes, dtypes and devices were checked in attention.py; the
// values of lengths and starts are checked here.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros_like.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include <optional>
#include <stdexcept>

#include "../cpu/dispatch.h"
#include "parse.h"

namespace py = pybind11;
using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

namespace {

rmt::Type type_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return rmt::Type::f32;
    case at::kBFloat16:
      return rmt::Type::bf16;
    case at::kHalf:
      return rmt::Type::f16;
    default:
      throw py::type_error("query must be float32, bfloat16 or float16");
  }
}

// Rows contiguous; copies only where they are not.
Tensor with_rows(const Tensor& t) { return t.size(3) <= 1 || t.stride(3) == 1 ? t : t.contiguous(); }

rmt::Matrix matrix(const Tensor& t) {
  return {static_cast<char*>(t.data_ptr()), t.stride(0), t.stride(1), t.stride(2)};
}

// Same shape; heads and rows in memory in the order that `t` has them. ops.py's fake kernels say the same.
Tensor like(const Tensor& t) {
  if (t.stride(1) >= t.stride(2)) return at::empty(t.sizes(), t.options());
  return at::empty({t.size(0), t.size(2), t.size(1), t.size(3)}, t.options()).transpose(1, 2);
}

const int32_t* checked(const char* name, const MaybeTensor& given, std::vector<Tensor>& kept, int most) {
  if (!given) return nullptr;
  kept.push_back(given->contiguous());
  const auto* values = kept.back().data_ptr<int32_t>();
  for (int64_t b = 0; b < given->numel(); ++b)
    if (values[b] < 0 || values[b] > most)
      throw std::invalid_argument(std::string(name) + " must be between 0 and " + std::to_string(most) + ", got " +
                                  std::to_string(values[b]) + " for batch row " + std::to_string(b));
  return values;
}

struct Call {
  rmt::Problem problem{};
  std::vector<Tensor> kept;  // owners of what the problem points to

  rmt::Matrix read(const Tensor& t) {
    kept.push_back(with_rows(t));
    return matrix(kept.back());
  }

  Call(const Tensor& query, const Tensor& key, const Tensor& value, const MaybeTensor& cache_key,
       const MaybeTensor& cache_value, const MaybeTensor& lengths, const MaybeTensor& starts,
       const MaybeTensor& cache_starts, const MaybeTensor& query_start, const MaybeTensor& seed,
       const MaybeTensor& relative_key, const MaybeTensor& relative_bias, const MaybeTensor& content_bias,
       const MaybeTensor& position_bias, const std::vector<int64_t>& layout, double scale, double dropout_p,
       const std::vector<int64_t>& relative) {
    auto& p = problem;
    p.type = type_of(query);
    p.layout = rmt::parse_layout(layout);
    p.batch = query.size(0), p.heads = query.size(1), p.queries = query.size(2), p.head_dim = query.size(3);
    p.kv_heads = key.size(1);
    p.cache_rows = cache_key ? cache_key->size(2) : 0;
    p.keys = key.size(2) + p.cache_rows;
    if (p.keys != p.layout.num_keys() || p.queries != p.layout.num_queries())
      throw std::invalid_argument("layout: its rows differ from those of query and key");
    p.scale = scale;
    p.token_lengths = checked("token_lengths", lengths, kept, p.layout.token_rows);
    p.token_starts = checked("token_starts", starts, kept, p.layout.token_rows);
    p.cache_starts = checked("cache_starts", cache_starts, kept, p.layout.cache);
    p.query_start = checked("query_start", query_start, kept, p.layout.token_rows - p.queries);
    if (dropout_p > 0.0) {
      const auto bits = static_cast<uint64_t>(*seed->data_ptr<int64_t>());
      p.dropout = {dropout_p, static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32),
                   static_cast<uint32_t>(dropout_p * 4294967296.0)};
    }
    p.query = read(query), p.key = read(key), p.value = read(value);
    if (cache_key) p.cache_key = read(*cache_key), p.cache_value = read(*cache_value);
    if (relative.empty()) return;
    auto& r = p.relative;
    r.reach = relative.at(0), r.shifted = relative.at(1);
    const MaybeTensor& table = relative_key ? relative_key : relative_bias;
    r.offsets = table ? table->size(1) : 0;
    r.key = flat(relative_key), r.content_bias = flat(content_bias), r.position_bias = flat(position_bias);
    r.bias = reinterpret_cast<const float*>(flat(relative_bias));
  }

  char* flat(const MaybeTensor& t) {
    if (!t) return nullptr;
    kept.push_back(t->contiguous());
    return static_cast<char*>(kept.back().data_ptr());
  }

  void run(size_t (*bytes)(const rmt::Problem&, int), void (*kernel)(const rmt::Problem&, const rmt::Runtime&)) {
    if (problem.batch == 0 || problem.queries + problem.keys == 0) return;
    rmt::Runtime runtime = rmt::torch_runtime();
    // Below about ten microseconds of work, waking other threads costs more than they bring.
    const double work = 4.0 * problem.batch * problem.heads * problem.queries * problem.keys * problem.head_dim;
    if (work < 1e6) runtime.threads = 1;
    const Tensor scratch = at::empty({static_cast<int64_t>(bytes(problem, runtime.threads)) + 64}, at::kByte);
    const auto base = reinterpret_cast<uintptr_t>(scratch.data_ptr());
    runtime.scratch = reinterpret_cast<char*>((base + 63) / 64 * 64);
    py::gil_scoped_release unlocked;
    kernel(problem, runtime);
  }
};

#define RMT_SHARED                                                                                         \
  const Tensor &query, const Tensor &key, const Tensor &value, const MaybeTensor &cache_key,               \
      const MaybeTensor &cache_value, const MaybeTensor &lengths, const MaybeTensor &starts,               \
      const MaybeTensor &cache_starts, const MaybeTensor &query_start, const MaybeTensor &seed,            \
      const MaybeTensor &relative_key, const MaybeTensor &relative_bias, const MaybeTensor &content_bias,  \
      const MaybeTensor &position_bias, const std::vector<int64_t>&layout, double scale, double dropout_p, \
      const std::vector<int64_t>&relative
#define RMT_PASS                                                                                             \
  query, key, value, cache_key, cache_value, lengths, starts, cache_starts, query_start, seed, relative_key, \
      relative_bias, content_bias, position_bias, layout, scale, dropout_p, relative

std::tuple<Tensor, Tensor> forward(RMT_SHARED) {
  Call call(RMT_PASS);
  Tensor out = like(query), lse = at::empty({query.size(0), query.size(1), query.size(2)}, at::kFloat);
  call.problem.out = matrix(out);
  call.problem.lse = lse.data_ptr<float>();
  call.run(rmt::kernels().forward_scratch, rmt::kernels().forward);
  return {out, lse};
}

// Gradients of query, key, value and cache; where there are distance-dependent scores, of their four tensors too.
std::vector<Tensor> backward(const Tensor& grad_out, const MaybeTensor& grad_lse, const Tensor& out, const Tensor& lse,
                             RMT_SHARED) {
  Call call(RMT_PASS);
  auto& p = call.problem;
  Tensor dq = like(query), dk = like(key), dv = like(value), dck, dcv;
  p.out = call.read(out), p.grad_out = call.read(grad_out);
  const Tensor lse_rows = lse.contiguous(), grad_lse_rows = grad_lse ? grad_lse->contiguous() : Tensor();
  p.lse = lse_rows.data_ptr<float>();
  p.grad_lse = grad_lse ? grad_lse_rows.data_ptr<float>() : nullptr;
  p.grad_query = matrix(dq), p.grad_key = matrix(dk), p.grad_value = matrix(dv);
  dck = cache_key ? like(*cache_key) : at::empty({0}, query.options());
  dcv = cache_value ? like(*cache_value) : at::empty({0}, query.options());
  if (cache_key) p.grad_cache_key = matrix(dck), p.grad_cache_value = matrix(dcv);
  std::vector<Tensor> found{dq, dk, dv, dck, dcv};
  if (!relative.empty()) {
    const auto gradient = [&](const MaybeTensor& t) {
      // Nothing is summed where there are no rows.
      found.push_back(t ? at::zeros_like(*t, at::MemoryFormat::Contiguous) : at::empty({0}, query.options()));
      return t ? static_cast<char*>(found.back().data_ptr()) : nullptr;
    };
    p.relative.grad_key = gradient(relative_key);
    p.relative.grad_bias = reinterpret_cast<float*>(gradient(relative_bias));
    p.relative.grad_content_bias = gradient(content_bias);
    p.relative.grad_position_bias = gradient(position_bias);
  }
  call.run(rmt::kernels().backward_scratch, rmt::kernels().backward);
  return found;
}

// The row arithmetic, for tests: (lo, hi, gap lo, gap hi, own) of each query row of a sample.
std::vector<std::array<int, 5>> rows(const std::vector<int64_t>& ints, int token_begin, int token_end, int cache_begin,
                                     int query_start) {
  const rmt::Layout layout = rmt::parse_layout(ints);
  std::vector<std::array<int, 5>> found;
  for (int q = 0; q < layout.num_queries(); ++q) {
    const rmt::Row r = rmt::row_of(layout, {token_begin, token_end, cache_begin, query_start}, q);
    found.push_back({r.lo, r.hi, r.gap_lo, r.gap_hi, r.own});
  }
  return found;
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of rmt_kernels; call them through rmt_kernels.segment_attention.";
  m.def("forward", &forward);
  m.def("backward", &backward);
  m.def("rows", &rows);
  m.def("isa", [] { return std::string(rmt::kernels().isa); }, "The instruction set whose kernels run.");
  m.def("isas", &rmt::usable_isas, "Instruction sets usable here, best first.");
  m.def("set_isa", &rmt::set_isa, "Run the kernels of another usable instruction set.");
  m.def("built_with_torch", [] { return std::string(RMT_TORCH_VERSION); });
}
