// The part of OpenMP that the kernels use, as GCC calls it, on POSIX threads and barriers.
// ThreadSanitizer knows those, where GNU OpenMP's own barriers are futexes that it does not see;
// and the kernels under test are compiled of their unchanged source.
#include "openmp.h"

#include <omp.h>
#include <pthread.h>
#include <unistd.h>

#include <cstdlib>
#include <vector>

namespace lk::sanitize {

int barriers = 0;
int skipped = -1;
int late = 0;

namespace {

struct Region {
  void (*body)(void*);
  void* data;
  int threads;
  bool within;  // another, as the kernels of an expert are; its one thread waits for nobody
  pthread_barrier_t barrier;
};
struct Member {
  Region* region;
  int thread;
};
thread_local Member self{nullptr, 0};
thread_local int met = 0;

void wait_if_late() {
  if (met == skipped && self.thread == late) usleep(3000);
}

void* enter(void* member) {
  self = *static_cast<Member*>(member);
  met = 0;
  wait_if_late();
  self.region->body(self.region->data);
  return nullptr;
}

}  // namespace

}  // namespace lk::sanitize

using namespace lk::sanitize;

extern "C" {

int omp_get_thread_num() { return self.thread; }
int omp_get_num_threads() { return self.region ? self.region->threads : 1; }

void GOMP_barrier() {
  if (self.region->within) return;
  if (met++ != skipped) pthread_barrier_wait(&self.region->barrier);
  wait_if_late();
}

void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
  Region region{body, data, int(threads), self.region != nullptr, {}};
  if (region.within) {
    if (threads != 1) abort();  // OpenMP would give it one
    const Member outer = self;
    self = {&region, 0};
    body(data);
    self = outer;
    return;
  }
  pthread_barrier_init(&region.barrier, nullptr, threads);
  std::vector<pthread_t> others(threads - 1);
  std::vector<Member> members(threads);
  for (int i = 0; i < int(threads); i++) members[i] = {&region, i};
  for (size_t i = 0; i < others.size(); i++) pthread_create(&others[i], nullptr, enter, &members[i + 1]);
  enter(&members[0]);
  barriers = met;
  for (pthread_t other : others) pthread_join(other, nullptr);
  self = {nullptr, 0};
  pthread_barrier_destroy(&region.barrier);
}
}
