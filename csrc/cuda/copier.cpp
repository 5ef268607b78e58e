#include "copier.h"

#include <stdexcept>
#include <string>

namespace vmo {

namespace {

void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

void check_config(const CopierConfig& config) {
  require(config.records != nullptr, "the records' address is null");
  require(config.num_host_slots > 0 && config.num_device_slots > 0,
          "slots must be positive, got " + std::to_string(config.num_host_slots) +
              " in host memory and " + std::to_string(config.num_device_slots) +
              " on the device");
  require(!config.tensors.empty(), "a record needs at least one tensor");
  for (const TensorSlots& tensor : config.tensors) {
    require(tensor.slots != nullptr && tensor.slot_bytes > 0,
            "a tensor without slots or bytes");
    require(tensor.record_offset <= config.record_bytes &&
                tensor.slot_bytes <= config.record_bytes - tensor.record_offset,
            "a tensor of " + std::to_string(tensor.slot_bytes) + " bytes at " +
                std::to_string(tensor.record_offset) + " is not in a record of " +
                std::to_string(config.record_bytes));
  }
}

void check_slot(const char* where, int32_t slot, int32_t num_slots) {
  require(slot >= 0 && slot < num_slots, std::string(where) + " slot " + std::to_string(slot) +
                                             " is outside [0, " + std::to_string(num_slots) +
                                             ")");
}

}  // namespace

Copier::Copier(const CopierConfig& config) : config_(config) {
  check_config(config);
  const DeviceGuard guard(config.device);
  registration_ = std::make_unique<HostRegistration>(
      config.records, config.record_bytes * static_cast<uint64_t>(config.num_host_slots));
  // Of no use to copy engines, which work in order; but gather kernels of demands go first.
  int least = 0;
  int greatest = 0;
  check_cuda(cudaDeviceGetStreamPriorityRange(&least, &greatest),
             "cudaDeviceGetStreamPriorityRange");
  lanes_ = {std::make_unique<Stream>(greatest), std::make_unique<Stream>(least)};
  compute_ = std::make_unique<Event>();
}

Copier::~Copier() {
  try {
    const DeviceGuard guard(config_.device);
    for (const auto& lane : lanes_) cudaStreamSynchronize(lane->get());
    events_.clear();
    compute_.reset();
    for (auto& lane : lanes_) lane.reset();
    registration_.reset();
  } catch (const CudaError&) {
    // The driver is gone, and everything with it.
  }
}

void Copier::set_engine(CopyEngine engine) {
  require(engine == CopyEngine::kMemcpy || engine == CopyEngine::kGather,
          "copy engine " + std::to_string(static_cast<int32_t>(engine)) + " is not 0 or 1");
  require(engine == CopyEngine::kMemcpy ||
              config_.tensors.size() <= static_cast<size_t>(kMaxGatherTensors),
          "the gather kernel takes records of at most " + std::to_string(kMaxGatherTensors) +
              " tensors, got " + std::to_string(config_.tensors.size()));
  engine_ = engine;
}

int32_t Copier::copy(int32_t lane, const SlotPair* pairs, int32_t num_pairs) {
  require(lane == 0 || lane == 1, "lane " + std::to_string(lane) + " is not 0 or 1");
  require(num_pairs > 0, "a copy needs at least one pair of slots");
  for (int32_t i = 0; i < num_pairs; ++i) check(pairs[i]);
  const DeviceGuard guard(config_.device);
  const cudaStream_t stream = lanes_[static_cast<size_t>(lane)]->get();
  const int32_t ticket = take_ticket();
  try {
    queue(pairs, num_pairs, stream);
    check_cuda(cudaEventRecord(event_of(ticket).get(), stream), "cudaEventRecord (copies)");
  } catch (...) {
    cudaStreamSynchronize(stream);  // what was queued before the error
    release(ticket);
    throw;
  }
  return ticket;
}

void Copier::check(const SlotPair& pair) const {
  check_slot("host", pair.host_slot, config_.num_host_slots);
  check_slot("device", pair.device_slot, config_.num_device_slots);
}

void Copier::queue(const SlotPair* pairs, int32_t num_pairs, cudaStream_t stream) {
  if (engine_ == CopyEngine::kGather) {
    gather_records(registration_->device_address(), config_.record_bytes, config_.tensors,
                   pairs, num_pairs, stream);
    return;
  }
  for (int32_t i = 0; i < num_pairs; ++i) {
    const char* record =
        config_.records + static_cast<uint64_t>(pairs[i].host_slot) * config_.record_bytes;
    for (const TensorSlots& tensor : config_.tensors) {
      char* slot =
          tensor.slots + static_cast<uint64_t>(pairs[i].device_slot) * tensor.slot_bytes;
      check_cuda(cudaMemcpyAsync(slot, record + tensor.record_offset, tensor.slot_bytes,
                                 cudaMemcpyHostToDevice, stream),
                 "cudaMemcpyAsync");
    }
  }
}

bool Copier::done(int32_t ticket) {
  const DeviceGuard guard(config_.device);
  const cudaError_t code = cudaEventQuery(event_of(ticket).get());
  if (code == cudaErrorNotReady) {
    cudaGetLastError();  // not an error; the next call must not find it
    return false;
  }
  check_cuda(code, "cudaEventQuery (copies)");
  return true;
}

void Copier::wait(int32_t ticket) {
  const DeviceGuard guard(config_.device);
  check_cuda(cudaEventSynchronize(event_of(ticket).get()), "cudaEventSynchronize (copies)");
}

void Copier::join(int32_t ticket, cudaStream_t compute) {
  const DeviceGuard guard(config_.device);
  check_cuda(cudaStreamWaitEvent(compute, event_of(ticket).get(), 0),
             "cudaStreamWaitEvent (compute waits for copies)");
}

// A wait keeps to what the event stood for when it was queued: recording it anew is safe.
void Copier::release(int32_t ticket) {
  event_of(ticket);
  in_use_[static_cast<size_t>(ticket)] = false;
  free_tickets_.push_back(ticket);
}

void Copier::after_compute(cudaStream_t compute) {
  const DeviceGuard guard(config_.device);
  check_cuda(cudaEventRecord(compute_->get(), compute), "cudaEventRecord (compute)");
  for (const auto& lane : lanes_) {
    check_cuda(cudaStreamWaitEvent(lane->get(), compute_->get(), 0),
               "cudaStreamWaitEvent (copies wait for compute)");
  }
}

Event& Copier::event_of(int32_t ticket) {
  const auto index = static_cast<size_t>(ticket);
  require(ticket >= 0 && index < events_.size() && in_use_[index],
          "ticket " + std::to_string(ticket) + " is not in use");
  return *events_[index];
}

int32_t Copier::take_ticket() {
  if (free_tickets_.empty()) {
    events_.push_back(std::make_unique<Event>());
    in_use_.push_back(false);
    free_tickets_.push_back(static_cast<int32_t>(events_.size()) - 1);
  }
  const int32_t ticket = free_tickets_.back();
  free_tickets_.pop_back();
  in_use_[static_cast<size_t>(ticket)] = true;
  return ticket;
}

}  // namespace vmo
