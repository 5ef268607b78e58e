// Torch operators of the serving hot path: the core's C ABI on tensors. Registration only;
// what the operators do is written, tested and documented in the torch-free core.
#include <Python.h>
#include <torch/library.h>

#include <optional>

#include "c_api.h"

namespace {

template <typename T>
T* pointer_of(int64_t handle) {
  return reinterpret_cast<T*>(static_cast<intptr_t>(handle));
}

vmo_planner* planner_of(int64_t handle) { return pointer_of<vmo_planner>(handle); }

// As vmo_layer_call has it.
int32_t float_type_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return 0;
    case at::kBFloat16:
      return 1;
    case at::kHalf:
      return 2;
    default:
      TORCH_CHECK(false, "hidden must be float32, bfloat16 or float16, got ",
                  tensor.scalar_type());
  }
}

void check_ids(const at::Tensor& ids) {
  TORCH_CHECK(
      ids.dim() == 2 && ids.is_contiguous() && ids.device().is_cpu() &&
          (ids.scalar_type() == at::kInt || ids.scalar_type() == at::kLong),
      "topk_ids must be a contiguous CPU tensor [tokens, top_k] of int32 or int64, got ",
      ids.scalar_type(), " ", ids.sizes(), " on ", ids.device());
}

// One layer call for the first `num_tokens` rows of topk_ids (vmo_serve_layer): observes,
// plans, writes every id's pool row to slot_ids (padding rows get a row needed anyway) and
// looks ahead. info: int64 [5]; reads: int32 [most, 3]. Returns whether the need fits.
bool serve_layer(int64_t handle, int64_t observer, int64_t lookahead, int64_t layer,
                 const at::Tensor& topk_ids, int64_t num_tokens, int64_t flags,
                 const at::Tensor& weights, const std::optional<at::Tensor>& hidden,
                 double threshold, double value, int64_t max_reads, at::Tensor& slot_ids,
                 at::Tensor& info, at::Tensor& reads) {
  check_ids(topk_ids);
  TORCH_CHECK(slot_ids.is_contiguous() && slot_ids.sizes() == topk_ids.sizes() &&
                  slot_ids.scalar_type() == topk_ids.scalar_type(),
              "slot_ids must be like topk_ids, got ", slot_ids.scalar_type(), " ",
              slot_ids.sizes());
  TORCH_CHECK(info.scalar_type() == at::kLong && info.numel() == 5 && info.is_contiguous(),
              "info must be int64 [5]");
  TORCH_CHECK(num_tokens >= 0 && num_tokens <= topk_ids.size(0), "num_tokens ", num_tokens,
              " is outside [0, ", topk_ids.size(0), "]");
  TORCH_CHECK(observer == 0 || (weights.scalar_type() == at::kFloat &&
                                weights.is_contiguous() && weights.numel() == num_tokens),
              "weights must be contiguous float32 [num_tokens]");
  TORCH_CHECK(reads.scalar_type() == at::kInt && reads.is_contiguous() &&
                  reads.numel() >= 3 * max_reads,
              "reads must be int32 [max_reads, 3]");
  vmo_layer_call call{};
  call.ids = topk_ids.const_data_ptr();
  call.weights = observer != 0 ? weights.const_data_ptr<float>() : nullptr;
  call.rows = slot_ids.data_ptr();
  call.num_rows = num_tokens;
  call.num_padded_rows = topk_ids.size(0);
  call.layer = static_cast<int32_t>(layer);
  call.id_bytes = static_cast<int32_t>(topk_ids.element_size());
  call.top_k = static_cast<int32_t>(topk_ids.size(1));
  call.flags = static_cast<uint32_t>(flags);
  call.max_reads = static_cast<int32_t>(max_reads);
  call.threshold = static_cast<float>(threshold);
  call.value = static_cast<float>(value);
  if (hidden.has_value() && max_reads > 0) {
    TORCH_CHECK(hidden->dim() == 2 && hidden->size(0) >= num_tokens && hidden->stride(1) == 1 &&
                    hidden->device().is_cpu(),
                "hidden must be a CPU tensor [tokens, hidden], got ", hidden->sizes());
    call.hidden = hidden->const_data_ptr();
    call.hidden_stride = hidden->stride(0);
    call.hidden_type = float_type_of(*hidden);
  }
  const int32_t planned =
      vmo_serve_layer(planner_of(handle), pointer_of<vmo_observer>(observer),
                      pointer_of<vmo_lookahead>(lookahead), &call, info.data_ptr<int64_t>(),
                      reads.data_ptr<int32_t>());
  TORCH_CHECK(planned >= 0, vmo_last_error());
  return planned == 1;
}

// out[e] = sum of weights (float32 [tokens]) of the rows that chose expert e.
void expert_votes(const at::Tensor& topk_ids, const at::Tensor& weights, at::Tensor& out) {
  check_ids(topk_ids);
  TORCH_CHECK(weights.scalar_type() == at::kFloat && weights.is_contiguous() &&
                  weights.numel() <= topk_ids.size(0),
              "weights must be contiguous float32 of at most ", topk_ids.size(0), " rows");
  TORCH_CHECK(out.scalar_type() == at::kFloat && out.is_contiguous(),
              "out must be contiguous float32");
  TORCH_CHECK(
      vmo_expert_histogram(
          topk_ids.const_data_ptr(), weights.numel(), static_cast<int32_t>(topk_ids.size(1)),
          static_cast<int32_t>(topk_ids.element_size()), weights.const_data_ptr<float>(),
          static_cast<int32_t>(out.numel()), out.data_ptr<float>()) == 0,
      vmo_last_error());
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(vllm_moe_offload, library) {
  library.def(
      "serve_layer(int planner, int observer, int lookahead, int layer, Tensor topk_ids, "
      "int num_tokens, int flags, Tensor weights, Tensor? hidden, float threshold, float "
      "value, "
      "int max_reads, Tensor(a!) slot_ids, Tensor(b!) info, Tensor(c!) reads) -> bool");
  library.def("expert_votes(Tensor topk_ids, Tensor weights, Tensor(a!) out) -> ()");
}

TORCH_LIBRARY_IMPL(vllm_moe_offload, CPU, library) {
  library.impl("serve_layer", &serve_layer);
  library.impl("expert_votes", &expert_votes);
}

// `import vllm_moe_offload._C` loads the library, which registers the operators.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, 0, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
