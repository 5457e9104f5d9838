// The questions that expert_lora_linear's CPU code answers by the kernels of lora_linear: one weight
// for each segment of tokens, which are sorted by expert.
#pragma once
#include <vector>

#include "../common/types.h"
#include "../quantised/params.h"

namespace lk {

// A matrix, or vector, for each expert, `step` elements from one to the next.
struct Stack {
  View first;
  int64_t step = 0;
};

// The tokens of one expert.
struct Segment {
  int64_t expert, first, last;
};

// y = gain ⊙ z + bias with z = (x ⊙ scaled) Wᵀ + h Bᵀ and h = scale · (x ⊙ scaled) Aᵀ; or back the
// same with W in the place of Wᵀ. Without y only h is wanted.
struct ExpertProduct {
  View x;                    // [tokens, in], by rows; or the rows of it that `index` names
  Stack w, a, b;             // [out, in], back [in, out], by rows; [rank, in] [out, rank], any strides
  View y, z;                 // [tokens, out], of the type of x; z may have no data
  Stack bias, gain, scaled;  // [out] twice, [in]; or no data
  float* h;                  // [tokens, rank], or null
  float scale;
  bool back;
  int64_t n_in, n_out, rank, experts;
  int64_t small;  // tokens up to which one kernel streams W once, adapter and all
  std::vector<Segment> segments;
  int threads;
  std::vector<int64_t> index = {};    // [tokens], or empty
  const Quantised* packed = nullptr;  // W of all experts, in the place of the numbers of w
};

// da = pᵀ x [rank, in], db = (dy ⊙ gain)ᵀ h [out, rank], and over the tokens dbias = Σ dy and
// dgain = Σ dy ⊙ v: of each expert that has tokens those that have data.
struct ExpertGradients {
  View x, dy, v;         // [tokens, in] [tokens, out] twice, by rows, one type; x as in ExpertProduct
  const float *p, *h;    // [tokens, rank]
  Stack gain;            // [out], or no data
  Stack da, db;          // [rank, in] [out, rank], any strides
  float *dbias, *dgain;  // [experts, out], or null
  int64_t n_in, n_out, rank, experts;
  bool tiles;  // whether da is a product on tiles, where the level has them
  std::vector<Segment> segments;
  int threads;
  std::vector<int64_t> index = {};
};

// dx, da and db as BackwardSmall makes them, of experts with few tokens; those with data are wanted.
struct ExpertBackwardSmall {
  View dy, x, dx;       // [tokens, out] [tokens, in] twice, by rows; x as in ExpertProduct
  Stack w, a, b, gain;  // [out, in] by rows, [rank, in] [out, rank], any strides, [out] or no data
  Stack da, db;         // [rank, in] [out, rank], any strides
  const float* h;       // [tokens, rank]
  float scale;
  int64_t n_in, n_out, rank, experts;
  std::vector<Segment> segments;
  int threads;
  std::vector<int64_t> index = {};
  const Quantised* packed = nullptr;  // W of all experts, in the place of the numbers of w
};

}  // namespace lk
