// One function a kernel, as the mathematical library of CUDA has it.
#define FUNCTION(name, value)                                                     \
  extern "C" __global__ void one_##name(const float* given, float* made, int n) { \
    const int i = blockIdx.x * blockDim.x + threadIdx.x;                          \
    if (i >= n) return;                                                           \
    const float x = given[i];                                                     \
    made[i] = value;                                                              \
  }
#define DOUBLE(name, value)                                                            \
  extern "C" __global__ void double_##name(const double* given, double* made, int n) { \
    const int i = blockIdx.x * blockDim.x + threadIdx.x;                               \
    if (i >= n) return;                                                                \
    const double x = given[i];                                                         \
    made[i] = value;                                                                   \
  }
FUNCTION(exp, expf(x))
FUNCTION(exp2, exp2f(x))
FUNCTION(expm1, expm1f(x))
FUNCTION(log, logf(x))
FUNCTION(log2, log2f(x))
FUNCTION(log1p, log1pf(x))
FUNCTION(sin, sinf(x))
FUNCTION(cos, cosf(x))
FUNCTION(tan, tanf(x))
FUNCTION(tanh, tanhf(x))
FUNCTION(sinh, sinhf(x))
FUNCTION(atan, atanf(x))
FUNCTION(erf, erff(x))
FUNCTION(cbrt, cbrtf(x))
FUNCTION(sqrt, sqrtf(x))
FUNCTION(rsqrt, rsqrtf(x))
FUNCTION(pow, powf(fabsf(x), 1.7f))
FUNCTION(fmod, fmodf(x, 1.3f))
FUNCTION(round, roundf(x))
FUNCTION(fast_divide, __fdividef(x, 3.f))
FUNCTION(fast_exp, __expf(x))
FUNCTION(add_rz, __fadd_rz(x, 1e-3f))
FUNCTION(add_rd, __fadd_rd(x, 1e-3f))
FUNCTION(add_ru, __fadd_ru(x, 1e-3f))
FUNCTION(multiply_rz, __fmul_rz(x, 1.1f))
FUNCTION(divide_ru, __fdiv_ru(x, 3.f))
DOUBLE(exp, exp(x))
DOUBLE(log, log(x))
DOUBLE(sin, sin(x))
DOUBLE(cos, cos(x))
DOUBLE(tanh, tanh(x))
DOUBLE(rsqrt, rsqrt(x))
DOUBLE(pow, pow(fabs(x), 1.7))
DOUBLE(add_rz, __dadd_rz(x, 1e-3))
