// The module rmt_kernels._cuda, and rmt_kernels._emulated, which runs the same kernels on the host: addresses in,
// launches out. No torch. Shapes, dtypes, devices and the alignment of rows are seen to in backends/cuda.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <string>

#include "../cuda/kernels.h"
#include "instances.h"
#include "parse.h"
#if defined(RMT_EMULATED)
#include "../cuda/emulation/control.h"
#endif

namespace py = pybind11;

namespace {

rmt::Type parse_type(const std::string& name) {
  if (name == "bf16") return rmt::Type::bf16;
  if (name == "f16") return rmt::Type::f16;
  throw py::value_error("type must be 'bf16' or 'f16', got '" + name + "'");
}

const rmt::Kernels& kernels_for(rmt::Type type, int head_dim) {
  const rmt::Kernels* found = rmt::find_kernels(type, head_dim);
  if (found == nullptr) throw py::value_error("no kernels were compiled for this type and head_dim");
  return *found;
}

// What a launch follows from, but for the addresses; made once for every shape and device. `strides` are three numbers
// (batch, head, row), in elements, of each of the matrices that the constructor names.
class Launch {
 public:
  size_t workspace = 0;  // bytes

 protected:
  rmt::Problem problem_{};
  rmt::Chip chip_{};
  const rmt::Pass* pass_ = nullptr;

  Launch(const std::string& type, const std::vector<int64_t>& layout, const std::array<int, 7>& sizes, double scale,
         double dropout_p, int64_t l2_bytes) {
    rmt::Problem& p = problem_;
    p.type = parse_type(type), p.layout = rmt::parse_layout(layout);
    p.batch = sizes[0], p.heads = sizes[1], p.kv_heads = sizes[2], p.queries = sizes[3], p.keys = sizes[4];
    p.head_dim = sizes[5], p.cache_rows = sizes[6];
    if (p.head_dim % 8) throw py::value_error("head_dim must be a multiple of 8, got " + std::to_string(p.head_dim));
    p.scale = static_cast<float>(scale);
    p.dropout = {dropout_p, 0, 0, static_cast<uint32_t>(dropout_p * 4294967296.0)};
    chip_.l2_bytes = l2_bytes;
  }
  void choose(const rmt::Pass& pass) {
    pass_ = &pass;
    workspace = pass.workspace(problem_);
    pass.allow();
  }
  static void set(const std::vector<int64_t>& strides, std::initializer_list<rmt::Matrix*> matrices) {
    if (strides.size() != 3 * matrices.size()) throw py::value_error("strides: expected three of each matrix");
    size_t i = 0;
    for (rmt::Matrix* matrix : matrices) {
      matrix->batch = strides[i], matrix->head = strides[i + 1], matrix->row = strides[i + 2];
      i += 3;
    }
  }
  void start(const rmt::Problem& p, uintptr_t workspace_address, uintptr_t stream) const {
    const py::gil_scoped_release unlocked;
    pass_->run(p, chip_, reinterpret_cast<char*>(workspace_address), stream);
  }
};

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// The last arguments of both calls: of samples, and of dropout; 0 where there is none.
#define RMT_SAMPLES \
  uintptr_t lengths, uintptr_t starts, uintptr_t cache_starts, uintptr_t query_start, uintptr_t seed, uintptr_t stream
void set_samples(rmt::Problem& p, uintptr_t lengths, uintptr_t starts, uintptr_t cache_starts, uintptr_t query_start,
                 uintptr_t seed) {
  p.token_lengths = at<const int32_t>(lengths), p.token_starts = at<const int32_t>(starts);
  p.cache_starts = at<const int32_t>(cache_starts), p.query_start = at<const int32_t>(query_start);
  p.seed = at<const int64_t>(seed);
}

class Forward : public Launch {
 public:
  Forward(const std::string& type, const std::vector<int64_t>& layout, const std::array<int, 7>& sizes, double scale,
          double dropout_p, const std::vector<int64_t>& strides, int64_t l2_bytes)
      : Launch(type, layout, sizes, scale, dropout_p, l2_bytes) {
    rmt::Problem& p = problem_;
    set(strides, {&p.query, &p.key, &p.value, &p.cache_key, &p.cache_value, &p.out});
    const rmt::Kernels& kernels = kernels_for(p.type, p.head_dim);
    choose(static_cast<int64_t>(p.queries) * p.group() <= rmt::kFewRows ? kernels.decode : kernels.forward);
  }
  void operator()(uintptr_t query, uintptr_t key, uintptr_t value, uintptr_t cache_key, uintptr_t cache_value,
                  uintptr_t out, uintptr_t lse, uintptr_t workspace_address, RMT_SAMPLES) const {
    rmt::Problem p = problem_;
    p.query.data = at<char>(query), p.key.data = at<char>(key), p.value.data = at<char>(value);
    p.cache_key.data = at<char>(cache_key), p.cache_value.data = at<char>(cache_value);
    p.out.data = at<char>(out), p.lse = at<float>(lse);
    set_samples(p, lengths, starts, cache_starts, query_start, seed);
    start(p, workspace_address, stream);
  }
};

class Backward : public Launch {
 public:
  Backward(const std::string& type, const std::vector<int64_t>& layout, const std::array<int, 7>& sizes, double scale,
           double dropout_p, const std::vector<int64_t>& strides, int64_t l2_bytes)
      : Launch(type, layout, sizes, scale, dropout_p, l2_bytes) {
    rmt::Problem& p = problem_;
    set(strides, {&p.query, &p.key, &p.value, &p.cache_key, &p.cache_value, &p.grad_out, &p.out, &p.grad_query,
                  &p.grad_key, &p.grad_value, &p.grad_cache_key, &p.grad_cache_value});
    choose(kernels_for(p.type, p.head_dim).backward);
  }
  void operator()(uintptr_t query, uintptr_t key, uintptr_t value, uintptr_t cache_key, uintptr_t cache_value,
                  uintptr_t grad_out, uintptr_t out, uintptr_t grad_query, uintptr_t grad_key, uintptr_t grad_value,
                  uintptr_t grad_cache_key, uintptr_t grad_cache_value, uintptr_t lse, uintptr_t grad_lse,
                  uintptr_t workspace_address, RMT_SAMPLES) const {
    rmt::Problem p = problem_;
    p.query.data = at<char>(query), p.key.data = at<char>(key), p.value.data = at<char>(value);
    p.cache_key.data = at<char>(cache_key), p.cache_value.data = at<char>(cache_value);
    p.grad_out.data = at<char>(grad_out), p.out.data = at<char>(out);
    p.grad_query.data = at<char>(grad_query), p.grad_key.data = at<char>(grad_key);
    p.grad_value.data = at<char>(grad_value), p.grad_cache_key.data = at<char>(grad_cache_key);
    p.grad_cache_value.data = at<char>(grad_cache_value);
    p.lse = at<float>(lse), p.grad_lse = at<float>(grad_lse);
    set_samples(p, lengths, starts, cache_starts, query_start, seed);
    start(p, workspace_address, stream);
  }
};

py::dict built() {
  std::vector<std::pair<std::string, int>> instances;
  for (const rmt::Kernels& kernels : rmt::every_kernels())
    instances.emplace_back(kernels.type == rmt::Type::bf16 ? "bf16" : "f16", kernels.width);
  py::dict found;
  found["architectures"] = RMT_CUDA_ARCHITECTURES;
  found["compiler"] = RMT_CUDA_COMPILER;
  found["instances"] = instances;
  return found;
}

// Bytes of shared memory that a block takes at most, forward and backward; None where nothing was compiled.
std::optional<std::pair<int, int>> shared_memory(const std::string& type, int head_dim) {
  const rmt::Kernels* found = rmt::find_kernels(parse_type(type), head_dim);
  if (found == nullptr) return std::nullopt;
  return std::pair(std::max(found->forward.shared, found->decode.shared), found->backward.shared);
}

// How query rows [first, first + rows) walk the keys in tiles of `keys`, for tests: the visited tiles in order, and
// whether each needs no mask.
std::vector<std::pair<int, bool>> walk(const std::vector<int64_t>& ints, const std::array<int, 4>& sample, int first,
                                       int rows, int keys) {
  const rmt::Layout layout = rmt::parse_layout(ints);
  rmt::Span span;
  for (int q = first; q < rmt::min_int(first + rows, layout.num_queries()); ++q) {
    const rmt::Row row = rmt::row_of(layout, {sample[0], sample[1], sample[2], sample[3]}, q);
    if (row.lo < row.hi || row.own >= 0) span.add(row);
  }
  span.finish();
  const rmt::Walk walk = rmt::walk_of(span, keys);
  std::vector<std::pair<int, bool>> found;
  for (int tile = walk.from(0); tile >= 0; tile = walk.from(tile + 1)) {
    if (!walk.holds(tile) ||
        walk.after(tile) + static_cast<int>(found.size()) + 1 != walk.after(-1))  // the ways of asking must agree
      throw std::logic_error("walk: inconsistent at tile " + std::to_string(tile));
    found.emplace_back(tile, span.open(tile * keys, (tile + 1) * keys));
  }
  return found;
}

}  // namespace

PYBIND11_MODULE(RMT_MODULE, m) {
  m.doc() = "CUDA kernels of rmt_kernels; call them through rmt_kernels.segment_attention.";
  py::class_<Launch>(m, "Launch").def_readonly("workspace", &Launch::workspace);
  using Strides = const std::vector<int64_t>&;
  using Sizes = const std::array<int, 7>&;
  py::class_<Forward, Launch>(m, "Forward")
      .def(py::init<const std::string&, Strides, Sizes, double, double, Strides, int64_t>())
      .def("__call__", &Forward::operator());
  py::class_<Backward, Launch>(m, "Backward")
      .def(py::init<const std::string&, Strides, Sizes, double, double, Strides, int64_t>())
      .def("__call__", &Backward::operator());
  m.def("built", &built, "Architectures, compiler, and (type, width) of the kernels.");
  m.def("shared_memory", &shared_memory);
  m.def("walk", &walk);
#if defined(RMT_EMULATED)
  m.def("set_schedule", &rmt::emulation::set_schedule, py::arg("resident_blocks") = 1, py::arg("seed") = 0);
  m.def("set_race_detection", &rmt::emulation::set_race_detection);
  m.def("set_strict_warps", &rmt::emulation::set_strict_warps);
  m.def("counters", [] {
    const rmt::emulation::Counters& c = rmt::emulation::counters();
    py::dict found;
    found["multiplies"] = c.multiplies;
    found["matrix_loads"] = c.matrix_loads;
    found["matrix_load_conflicts"] = c.matrix_load_conflicts;
    found["shared_load_conflicts"] = c.shared_load_conflicts;
    found["shared_store_conflicts"] = c.shared_store_conflicts;
    found["copied_bytes"] = c.copied_bytes;
    found["barriers"] = c.barriers;
    return found;
  });
#endif
}
