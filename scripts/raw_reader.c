// Threads that preadv from one file, for bench_reads.py: shares no line with the engine, and
// never waits for the interpreter's lock.
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/uio.h>
#include <unistd.h>

struct part {
  long offset;
  void* target;
  long length;
};
struct raw {
  int fd, num_threads, stop;
  long num_parts;
  const struct part* parts;
  atomic_long next;
  atomic_int error;
  pthread_barrier_t begin, end;
  pthread_t threads[64];
};

static void* work(void* argument) {
  struct raw* raw = argument;
  for (;;) {
    pthread_barrier_wait(&raw->begin);
    if (raw->stop) return NULL;
    for (long i; (i = atomic_fetch_add(&raw->next, 1)) < raw->num_parts;) {
      const struct part* part = &raw->parts[i];
      for (long done = 0; done < part->length;) {
        struct iovec vector = {(char*)part->target + done, part->length - done};
        ssize_t count = preadv(raw->fd, &vector, 1, part->offset + done);
        if (count <= 0) {
          atomic_store(&raw->error, count < 0 ? errno : EIO);
          break;
        }
        done += count;
      }
    }
    pthread_barrier_wait(&raw->end);
  }
}

struct raw* raw_open(int fd, int num_threads) {
  struct raw* raw = calloc(1, sizeof *raw);
  raw->fd = fd;
  raw->num_threads = num_threads;
  pthread_barrier_init(&raw->begin, NULL, num_threads + 1);
  pthread_barrier_init(&raw->end, NULL, num_threads + 1);
  for (int i = 0; i < num_threads; i++) pthread_create(&raw->threads[i], NULL, work, raw);
  return raw;
}

int raw_read(struct raw* raw, const struct part* parts, long num_parts) {
  raw->parts = parts;
  raw->num_parts = num_parts;
  atomic_store(&raw->next, 0);
  atomic_store(&raw->error, 0);
  pthread_barrier_wait(&raw->begin);
  pthread_barrier_wait(&raw->end);
  return atomic_load(&raw->error);
}

void raw_close(struct raw* raw) {
  raw->stop = 1;
  pthread_barrier_wait(&raw->begin);
  for (int i = 0; i < raw->num_threads; i++) pthread_join(raw->threads[i], NULL);
  free(raw);
}
