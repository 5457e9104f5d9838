// y = x · mask, the mask of lora_kernels.ops.dropout: Philox 4x32-10, key = seed, counter = (column / 4, row, 0, 0).
#include <cstdint>

extern "C" __global__ void dropout(const float* x, float* y, int rows, int columns, uint32_t threshold, float kept,
                                   uint64_t seed) {
  const int group = blockIdx.x * blockDim.x + threadIdx.x, row = blockIdx.y;
  if (group * 4 >= columns) return;
  uint32_t c[4] = {uint32_t(group), uint32_t(row), 0, 0}, k[2] = {uint32_t(seed), uint32_t(seed >> 32)};
  for (int round = 0; round < 10; round++) {
    const uint32_t high0 = __umulhi(0xD2511F53u, c[0]), low0 = 0xD2511F53u * c[0];
    const uint32_t high1 = __umulhi(0xCD9E8D57u, c[2]), low1 = 0xCD9E8D57u * c[2];
    c[0] = high1 ^ c[1] ^ k[0], c[1] = low1, c[2] = high0 ^ c[3] ^ k[1], c[3] = low0;
    k[0] += 0x9E3779B9u, k[1] += 0xBB67AE85u;
  }
  for (int i = 0; i < 4 && group * 4 + i < columns; i++) {
    const int64_t at = int64_t(row) * columns + group * 4 + i;
    y[at] = c[i] >= threshold ? x[at] * kept : 0.f;
  }
}
