// Copies records from mapped host memory into rows of several tensors, by a kernel.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

namespace vmo {

// One tensor of a record: `row_bytes` from `record_offset` on, to row r at `rows` + r *
// row_bytes.
struct TensorRows {
  uint64_t record_offset = 0;
  uint64_t row_bytes = 0;
  char* rows = nullptr;
};

struct RowPair {
  int32_t host_row = 0;
  int32_t device_row = 0;
};

// Most tensors of a record that the kernel takes.
inline constexpr int32_t kMaxGatherTensors = 16;

// Queues the copies of all pairs on `stream`; `records` is host memory as the device sees it.
// A fixed, small grid: the link is the limit, and kernels beside it need the processors.
// Throws CudaError, and std::invalid_argument on more than kMaxGatherTensors tensors.
void gather_records(const char* records, uint64_t record_bytes,
                    const std::vector<TensorRows>& tensors, const RowPair* pairs,
                    int32_t num_pairs, cudaStream_t stream);

}  // namespace vmo
