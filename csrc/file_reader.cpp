#include "file_reader.h"

#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstdlib>
#include <new>
#include <stdexcept>
#include <system_error>
#include <utility>

namespace vmo {

namespace {

// What waits is cut evenly for all threads, but not finer than one read needs to hide its
// own latency. Prefetches are cut finer than demands, which wait for their chunks to end.
constexpr uint64_t kMinChunkBytes = 256U << 10;
constexpr uint64_t kMaxDemandChunkBytes = 4U << 20;
constexpr uint64_t kMaxPrefetchChunkBytes = 1U << 20;
constexpr int32_t kEndOfFile = -1;

uint64_t round_up(uint64_t value) {
  return (value + kDirectAlignment - 1) / kDirectAlignment * kDirectAlignment;
}

std::string describe_errno(int error) { return std::system_category().message(error); }

// `path` is a reference and `how` is no std::string: making one could change errno.
[[noreturn]] void throw_errno(const char* what, const std::string& path, const char* how = "") {
  const int error = errno;
  throw std::runtime_error(what + path + how + ": " + describe_errno(error));
}

// Blocks all signals while it lives: threads started meanwhile never run the handlers of
// the interpreter.
class SignalsBlocked {
 public:
  SignalsBlocked() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &previous_);
  }
  ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &previous_, nullptr); }
  SignalsBlocked(const SignalsBlocked&) = delete;
  SignalsBlocked& operator=(const SignalsBlocked&) = delete;

 private:
  sigset_t previous_;
};

void bind_thread(std::thread& thread, const std::vector<int32_t>& cpus) {
  const int32_t last = *std::max_element(cpus.begin(), cpus.end());
  if (*std::min_element(cpus.begin(), cpus.end()) < 0) {
    throw std::invalid_argument("negative cpu number in the affinity of the I/O threads");
  }
  const auto count = static_cast<size_t>(last) + 1;
  struct FreeCpuSet {
    void operator()(cpu_set_t* set) const { CPU_FREE(set); }
  };
  const std::unique_ptr<cpu_set_t, FreeCpuSet> set(CPU_ALLOC(count));
  if (set == nullptr) throw std::bad_alloc();
  const size_t bytes = CPU_ALLOC_SIZE(count);
  CPU_ZERO_S(bytes, set.get());
  for (const int32_t cpu : cpus) CPU_SET_S(static_cast<size_t>(cpu), bytes, set.get());
  const int error = pthread_setaffinity_np(thread.native_handle(), bytes, set.get());
  if (error != 0) {
    throw std::runtime_error("cannot bind I/O threads to the cpus given: " +
                             describe_errno(error));
  }
}

[[noreturn]] void throw_tag_in_use(int64_t tag) {
  throw std::invalid_argument("read tag " + std::to_string(tag) + " is in use");
}

// Fills `vectors` with the part of `extents` that holds bytes [begin, end) of their sum.
void slice(const std::vector<iovec>& extents, uint64_t begin, uint64_t end,
           std::vector<iovec>& vectors) {
  vectors.clear();
  uint64_t extent_begin = 0;
  for (const iovec& extent : extents) {
    const uint64_t extent_end = extent_begin + extent.iov_len;
    const uint64_t from = std::max(begin, extent_begin);
    const uint64_t to = std::min(end, extent_end);
    if (from < to) {
      char* base = static_cast<char*>(extent.iov_base) + (from - extent_begin);
      vectors.push_back({base, static_cast<size_t>(to - from)});
    }
    extent_begin = extent_end;
    if (extent_begin >= end || vectors.size() == IOV_MAX) break;
  }
}

}  // namespace

OpenFile::OpenFile(const std::string& path, bool direct)
    // Follows no link that took the file's place since it was looked at, and waits for no pipe.
    : descriptor_(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK |
                                         (direct ? O_DIRECT : 0))) {
  if (descriptor_ < 0) throw_errno("cannot open ", path, direct ? " with O_DIRECT" : "");
  try {
    struct stat status{};
    if (fstat(descriptor_, &status) != 0) throw_errno("cannot stat ", path);
    if (!S_ISREG(status.st_mode)) throw std::runtime_error(path + " is not a regular file");
    bytes_ = static_cast<uint64_t>(status.st_size);
    if (direct) probe_direct(path);
  } catch (...) {
    close(descriptor_);
    throw;
  }
}

OpenFile::OpenFile(OpenFile&& other) noexcept
    : descriptor_(std::exchange(other.descriptor_, -1)), bytes_(other.bytes_) {}

OpenFile::~OpenFile() {
  if (descriptor_ >= 0) close(descriptor_);
}

// Some file systems accept O_DIRECT in open() and refuse the first read.
void OpenFile::probe_direct(const std::string& path) const {
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  const std::unique_ptr<void, Free> block(
      std::aligned_alloc(kDirectAlignment, kDirectAlignment));
  if (block == nullptr) throw std::bad_alloc();
  if (pread(descriptor_, block.get(), kDirectAlignment, 0) < 0 && errno == EINVAL) {
    throw_errno("cannot read ", path, " with O_DIRECT");
  }
}

FileReader::FileReader(const std::vector<std::string>& paths, bool direct, int32_t num_threads,
                       const std::vector<int32_t>& cpus)
    : process_(getpid()), direct_(direct) {
  if (paths.empty()) throw std::invalid_argument("the file reader needs at least 1 file");
  if (num_threads < 1) {
    throw std::invalid_argument("the file reader needs at least 1 thread, got " +
                                std::to_string(num_threads));
  }
  for (const std::string& path : paths) files_.emplace_back(path, direct);
  num_threads_ = static_cast<size_t>(num_threads);
  max_prefetch_chunks_ = std::max<size_t>(num_threads_ - 1, 1);
  try {
    start_threads(num_threads, cpus);
  } catch (...) {
    stop_threads();
    throw;
  }
}

FileReader::~FileReader() { stop_threads(); }

bool FileReader::is_forked() const { return getpid() != process_; }

bool FileReader::close_if_forked() {
  if (!is_forked()) return false;
  files_.clear();
  return true;
}

uint64_t FileReader::file_bytes() const {
  uint64_t bytes = 0;
  for (const OpenFile& file : files_) bytes += file.bytes();
  return bytes;
}

void FileReader::start_threads(int32_t num_threads, const std::vector<int32_t>& cpus) {
  const SignalsBlocked blocked;
  for (int32_t i = 0; i < num_threads; ++i) {
    threads_.emplace_back(&FileReader::work, this);
    pthread_setname_np(threads_.back().native_handle(), "vmo-reader");
    if (!cpus.empty()) bind_thread(threads_.back(), cpus);
  }
}

void FileReader::stop_threads() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  work_ready_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

// ---- called by users ---------------------------------------------------------------------

void FileReader::check_process() const {
  if (!is_forked()) return;
  throw std::runtime_error("the file reader of process " + std::to_string(process_) +
                           " was called in process " + std::to_string(getpid()) +
                           ", which was forked from it: each process needs its own");
}

void FileReader::check(const ReadRequest& read) const {
  const std::string name = "read with tag " + std::to_string(read.tag) + ": ";
  if (read.priority != Priority::kDemand && read.priority != Priority::kPrefetch) {
    throw std::invalid_argument(name + "priority must be 0 or 1");
  }
  if (read.extents.empty()) throw std::invalid_argument(name + "no extents");
  constexpr auto kLargestOffset = static_cast<uint64_t>(INT64_MAX);
  uint64_t misaligned = read.offset;
  uint64_t end = std::min(read.offset, kLargestOffset);
  for (const iovec& extent : read.extents) {
    if (extent.iov_len == 0) throw std::invalid_argument(name + "an extent is empty");
    misaligned |= reinterpret_cast<uintptr_t>(extent.iov_base) | extent.iov_len;
    if (extent.iov_len > kLargestOffset - end) {
      throw std::invalid_argument(name + "ends beyond the largest file offset");
    }
    end += extent.iov_len;
  }
  if (direct_ && misaligned % kDirectAlignment != 0) {
    throw std::invalid_argument(name + "offset, addresses and lengths must be multiples of " +
                                std::to_string(kDirectAlignment) + " for O_DIRECT");
  }
}

std::unique_ptr<FileReader::Request> FileReader::make_request(ReadRequest&& read) const {
  auto request = std::make_unique<Request>();
  request->read = std::move(read);
  for (const iovec& extent : request->read.extents) request->total_bytes += extent.iov_len;
  request->result.tag = request->read.tag;
  return request;
}

void FileReader::move_to(List& list, Request* request) {
  const uint64_t waiting_bytes = request->total_bytes - request->issued_bytes;
  if (request->list == &demands_) demand_bytes_ -= waiting_bytes;
  if (&list == &demands_) demand_bytes_ += waiting_bytes;
  list.splice(list.end(), *request->list, request->position);
  request->list = &list;
}

uint64_t FileReader::chunk_bytes_of(const Request& request) const {
  if (request.list != &demands_) return std::min(request.total_bytes, kMaxPrefetchChunkBytes);
  const uint64_t share = demand_bytes_ / num_threads_;
  const uint64_t most = std::clamp(share, kMinChunkBytes, kMaxDemandChunkBytes);
  const uint64_t num_chunks = (request.total_bytes + most - 1) / most;
  return round_up((request.total_bytes + num_chunks - 1) / num_chunks);
}

void FileReader::submit(std::vector<ReadRequest> reads) {
  check_process();
  // All memory is allocated before anything is queued: either all requests are, or none.
  std::unordered_map<int64_t, std::unique_ptr<Request>> fresh;
  List demands;
  List prefetches;
  uint64_t demand_bytes = 0;
  for (ReadRequest& read : reads) {
    check(read);
    std::unique_ptr<Request> request = make_request(std::move(read));
    const bool is_demand = request->read.priority == Priority::kDemand;
    List& list = is_demand ? demands : prefetches;
    request->position = list.insert(list.end(), request.get());
    request->list = is_demand ? &demands_ : &prefetches_;
    if (is_demand) demand_bytes += request->total_bytes;
    const int64_t tag = request->read.tag;
    if (!fresh.emplace(tag, std::move(request)).second) throw_tag_in_use(tag);
  }
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& [tag, request] : fresh) {
      if (requests_.count(tag) != 0) throw_tag_in_use(tag);
    }
    requests_.reserve(requests_.size() + fresh.size());
    requests_.merge(fresh);
    demands_.splice(demands_.end(), demands);
    prefetches_.splice(prefetches_.end(), prefetches);
    demand_bytes_ += demand_bytes;
  }
  work_ready_.notify_one();  // who takes a chunk wakes the next thread if more are left
}

bool FileReader::promote(int64_t tag) {
  check_process();
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = requests_.find(tag);
    if (found == requests_.end() || found->second->list != &prefetches_) return false;
    move_to(demands_, found->second.get());
  }
  work_ready_.notify_one();
  return true;
}

bool FileReader::drop(int64_t tag) {
  check_process();
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = requests_.find(tag);
    if (found == requests_.end()) return false;
    Request* request = found->second.get();
    if (request->list != &demands_ && request->list != &prefetches_) return false;
    move_to(issued_, request);
    if (request->issued_bytes != 0) {
      request->result.error = ECANCELED;
      end_if_done(request);
      return false;
    }
    issued_.erase(request->position);
    requests_.erase(found);
  }
  result_ready_.notify_all();  // a waiter must see it if nothing is in flight any more
  return true;
}

bool FileReader::is_over(size_t min_count) const {
  return ended_.size() >= min_count || ended_.size() == requests_.size();
}

void FileReader::sleep_until(std::unique_lock<std::mutex>& lock, size_t wanted,
                             std::chrono::milliseconds timeout) {
  // One wake-up per batch, not per read: threads that read need the cores.
  notify_at_ = num_waiters_ == 0 ? wanted : std::min(notify_at_, wanted);
  ++num_waiters_;
  const auto over = [&] { return is_over(wanted); };
  if (timeout.count() < 0) {
    result_ready_.wait(lock, over);
  } else {
    result_ready_.wait_for(lock, timeout, over);
  }
  --num_waiters_;
  if (num_waiters_ > 0) notify_at_ = 1;
}

size_t FileReader::wait(ReadResult* results, size_t capacity, size_t min_count,
                        std::chrono::milliseconds timeout) {
  check_process();
  const size_t wanted = std::clamp<size_t>(min_count, 1, std::max<size_t>(capacity, 1));
  std::unique_lock<std::mutex> lock(mutex_);
  if (timeout.count() != 0) sleep_until(lock, wanted, timeout);
  size_t count = 0;
  for (; count < capacity && !ended_.empty(); ++count) {
    results[count] = ended_.front()->result;
    ended_.pop_front();
    --num_ended_;
    requests_.erase(results[count].tag);
  }
  return count;
}

// ---- run by the threads ------------------------------------------------------------------

void FileReader::work() {
  std::vector<iovec> vectors;
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    work_ready_.wait(lock, [this] { return stopping_ || may_take(); });
    if (stopping_) return;
    const Chunk chunk = take();
    if (may_take()) work_ready_.notify_one();
    lock.unlock();
    const ChunkResult result = read_chunk(chunk, vectors);
    lock.lock();
    end_chunk(chunk, result);
  }
}

bool FileReader::may_take() const {
  if (!demands_.empty()) return true;
  return !prefetches_.empty() && running_prefetch_chunks_ < max_prefetch_chunks_;
}

FileReader::Chunk FileReader::take() {
  const bool is_demand = !demands_.empty();
  Request* request = is_demand ? demands_.front() : prefetches_.front();
  if (request->issued_bytes == 0) request->chunk_bytes = chunk_bytes_of(*request);
  const uint64_t begin = request->issued_bytes;
  const uint64_t end = std::min(begin + request->chunk_bytes, request->total_bytes);
  const Chunk chunk{request, begin, end, is_demand ? Priority::kDemand : Priority::kPrefetch};
  if (!is_demand) ++running_prefetch_chunks_;
  ++request->running_chunks;
  if (is_demand) demand_bytes_ -= chunk.end - chunk.begin;
  request->issued_bytes = chunk.end;
  if (chunk.end == request->total_bytes) move_to(issued_, request);
  return chunk;
}

FileReader::ChunkResult FileReader::read_chunk(const Chunk& chunk,
                                               std::vector<iovec>& vectors) const {
  ChunkResult result;
  const uint64_t wanted = chunk.end - chunk.begin;
  const ReadRequest& read = chunk.request->read;
  uint64_t offset = read.offset;
  auto file = files_.begin();
  while (offset >= file->bytes() && file + 1 != files_.end()) {
    offset -= file->bytes();
    ++file;
  }
  while (result.bytes < wanted) {
    const uint64_t begin = chunk.begin + result.bytes;
    try {
      slice(read.extents, begin, chunk.end, vectors);
    } catch (const std::bad_alloc&) {
      result.error = ENOMEM;
      break;
    }
    const ssize_t got =
        preadv(file->descriptor(), vectors.data(), static_cast<int>(vectors.size()),
               static_cast<off_t>(offset + begin));
    if (got < 0) {
      if (errno == EINTR) continue;
      result.error = errno;
      break;
    }
    auto arrived = static_cast<uint64_t>(got);
    // The last bytes of a file may end within a block, from which O_DIRECT cannot go on.
    if (direct_) arrived -= arrived % kDirectAlignment;
    if (arrived == 0) {
      result.error = kEndOfFile;
      break;
    }
    result.bytes += arrived;
  }
  return result;
}

void FileReader::end_chunk(const Chunk& chunk, const ChunkResult& result) {
  Request* request = chunk.request;
  if (chunk.priority == Priority::kPrefetch) --running_prefetch_chunks_;
  --request->running_chunks;
  request->result.bytes += result.bytes;
  if (result.error != 0 && request->result.error == 0) {
    request->result.error = result.error;
    if (request->list != &issued_) move_to(issued_, request);  // the rest is not worth it
  }
  end_if_done(request);
}

void FileReader::end_if_done(Request* request) {
  if (request->list != &issued_ || request->running_chunks != 0) return;
  move_to(ended_, request);
  ++num_ended_;
  if (num_waiters_ > 0 && is_over(notify_at_)) result_ready_.notify_all();
}

}  // namespace vmo
