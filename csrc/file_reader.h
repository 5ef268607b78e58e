// Reads records of the expert store into memory with a few threads and preadv.
//
// Two priorities: no prefetch begins while a demand waits. A record is cut into chunks, so
// that several threads work on one of them: at batch size 1 a single miss must reach the
// disk's bandwidth too. Idle threads sleep; they never spin, because computing threads need
// the cores.
#pragma once

#include <sys/types.h>
#include <sys/uio.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

namespace vmo {

// Alignment that O_DIRECT asks of offsets, lengths and addresses, in bytes.
constexpr uint64_t kDirectAlignment = 4096;

enum class Priority : int32_t { kDemand = 0, kPrefetch = 1 };

// `iov_len` bytes to each extent's address, consecutive from `offset` on in the reader's files,
// one behind the other; of one file only.
struct ReadRequest {
  int64_t tag = 0;
  uint64_t offset = 0;
  Priority priority = Priority::kDemand;
  std::vector<iovec> extents;
};

struct ReadResult {
  int64_t tag = 0;
  int32_t error = 0;   // errno of the chunk that failed first, -1: the file ends too early
  uint64_t bytes = 0;  // bytes that arrived
};

// An open regular file.
class OpenFile {
 public:
  // `direct` bypasses the page cache. Throws std::runtime_error naming the path if it is no
  // regular file, cannot be opened, or its file system refuses O_DIRECT.
  OpenFile(const std::string& path, bool direct);
  ~OpenFile();
  OpenFile(OpenFile&& other) noexcept;
  OpenFile(const OpenFile&) = delete;
  OpenFile& operator=(const OpenFile&) = delete;
  OpenFile& operator=(OpenFile&&) = delete;
  int descriptor() const { return descriptor_; }
  uint64_t bytes() const { return bytes_; }

 private:
  void probe_direct(const std::string& path) const;

  int descriptor_;
  uint64_t bytes_ = 0;
};

// Files, one behind the other, and the threads that read them. Safe to call from several
// threads, except for the destructor, which must not race with anything. A process that is
// forked from the reader's has none of its threads: there, submit(), promote(), drop() and
// wait() throw std::runtime_error, and close_if_forked() has to be called.
class FileReader {
 public:
  // Opens `paths` (one at least). Threads run on `cpus`, or where the calling thread may run if
  // there are none. Throws as OpenFile, and std::runtime_error if a thread cannot be started.
  FileReader(const std::vector<std::string>& paths, bool direct, int32_t num_threads,
             const std::vector<int32_t>& cpus);
  // Waits for chunks that are being read; drops what is queued.
  ~FileReader();
  FileReader(const FileReader&) = delete;
  FileReader& operator=(const FileReader&) = delete;

  // In a forked process: closes the files and returns true. Then the reader must not be
  // destroyed, but left where it is: its mutex is locked for ever, and its lists are half
  // changed, if a thread was at it when the process was forked, and conditions on which
  // threads wait cannot be destroyed.
  bool close_if_forked();

  // Of all files together.
  uint64_t file_bytes() const;
  // Requests that wait() would report now.
  const std::atomic<int32_t>& num_ended() const { return num_ended_; }

  // Queues all requests, or none: throws std::invalid_argument on an extent that is empty,
  // or unaligned when reading directly, and on a tag that is in use. A tag is in use until
  // its result was taken by wait() or its request dropped by drop().
  void submit(std::vector<ReadRequest> requests);

  // Makes the rest of a queued prefetch a demand. False if nothing of it waits as prefetch.
  bool promote(int64_t tag);

  // Drops a request of which no chunk began; it is not reported. False if there is none: its
  // result comes, once no thread writes to it any more, with ECANCELED if chunks were left.
  bool drop(int64_t tag);

  // Writes up to `capacity` results and returns their number; asleep until there are
  // `min_count`, `timeout` passed (negative: never does) or no more are in flight. A request
  // is reported once, when no thread writes to its extents any more.
  size_t wait(ReadResult* results, size_t capacity, size_t min_count,
              std::chrono::milliseconds timeout);

 private:
  struct Request;
  // A request is on one list at a time and moves by splicing, which cannot fail.
  using List = std::list<Request*>;
  struct Request {
    ReadRequest read;
    uint64_t total_bytes = 0;
    uint64_t issued_bytes = 0;  // handed to threads, from the front
    uint64_t chunk_bytes = 0;   // set when the first chunk is
    int32_t running_chunks = 0;
    ReadResult result;
    List* list = nullptr;
    List::iterator position;
  };
  struct Chunk {
    Request* request = nullptr;
    uint64_t begin = 0;  // within the request
    uint64_t end = 0;
    Priority priority = Priority::kDemand;  // when it began
  };
  struct ChunkResult {
    int32_t error = 0;
    uint64_t bytes = 0;
  };

  void start_threads(int32_t num_threads, const std::vector<int32_t>& cpus);
  void stop_threads();
  bool is_forked() const;
  void check_process() const;
  void check(const ReadRequest& read) const;
  std::unique_ptr<Request> make_request(ReadRequest&& read) const;
  void move_to(List& list, Request* request);
  uint64_t chunk_bytes_of(const Request& request) const;

  void work();
  bool is_over(size_t min_count) const;
  void end_if_done(Request* request);
  void sleep_until(std::unique_lock<std::mutex>& lock, size_t wanted,
                   std::chrono::milliseconds timeout);
  bool may_take() const;
  Chunk take();
  ChunkResult read_chunk(const Chunk& chunk, std::vector<iovec>& vectors) const;
  void end_chunk(const Chunk& chunk, const ChunkResult& result);

  const pid_t process_;  // that has the threads
  const bool direct_;
  std::vector<OpenFile> files_;
  size_t num_threads_ = 0;
  // One thread is left to demands, so that they never queue behind running prefetches.
  size_t max_prefetch_chunks_ = 0;

  std::mutex mutex_;  // guards what follows
  std::condition_variable work_ready_;
  std::condition_variable result_ready_;
  bool stopping_ = false;
  size_t num_waiters_ = 0;
  size_t notify_at_ = 1;  // ended requests that a waiter wants
  size_t running_prefetch_chunks_ = 0;
  // By tag; each is on one of the lists below it.
  std::unordered_map<int64_t, std::unique_ptr<Request>> requests_;
  // With chunks still to be read.
  List demands_;
  uint64_t demand_bytes_ = 0;  // not handed out yet, of all on the list
  List prefetches_;
  // All chunks handed out.
  List issued_;
  // To be reported.
  List ended_;
  std::atomic<int32_t> num_ended_{0};
  std::vector<std::thread> threads_;
};

}  // namespace vmo
