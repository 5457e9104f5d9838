// The software pipeline of cp.async over STAGES stages of shared memory: copies run STAGES - 1
// steps ahead of the products.
#pragma once
#include "ptx.cuh"

namespace lk {

// load(step, stage) issues a thread's copies of a step. Past the last step the group is empty, so
// that the waits count alike.
template <int STAGES, typename Load>
__device__ __forceinline__ void pipeline_load(int step, int steps, Load&& load) {
  if (step < steps) load(step, step % STAGES);
  cp_async_commit();
}

template <int STAGES, typename Load>
__device__ __forceinline__ void pipeline_prologue(int steps, Load&& load) {
  static_assert(STAGES >= 2, "a copy needs a stage that is not being read");
  for (int step = 0; step < STAGES - 1; step++) pipeline_load<STAGES>(step, steps, load);
}

// Begins a step and returns its stage. The wait orders this thread's copies of the step before the
// barrier. The barrier orders the copies of all threads before every read of the stage, and every
// read of the stage before, which is the next to be filled, before the copies into that one.
template <int STAGES, typename Load>
__device__ __forceinline__ int pipeline_step(int step, int steps, Load&& load) {
  cp_async_wait<STAGES - 2>();
  __syncthreads();  // all copies of this stage are there, and the stage before it has been read
  pipeline_load<STAGES>(step + STAGES - 1, steps, load);
  return step % STAGES;
}

// The main loop: use(step, stage) computes, and overlapped() runs once, behind the first copies.
// No copy is in flight afterwards, but other threads may still read the last stage.
template <int STAGES, typename Load, typename Overlapped, typename Use>
__device__ __forceinline__ void pipelined(int steps, Load&& load, Overlapped&& overlapped, Use&& use) {
  pipeline_prologue<STAGES>(steps, load);
  overlapped();
  for (int step = 0; step < steps; step++) use(step, pipeline_step<STAGES>(step, steps, load));
}
template <int STAGES, typename Load, typename Use>
__device__ __forceinline__ void pipelined(int steps, Load&& load, Use&& use) {
  const auto nothing = [] {};
  pipelined<STAGES>(steps, load, nothing, use);
}

}  // namespace lk
