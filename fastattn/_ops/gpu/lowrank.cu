// The elementwise steps of a low-rank softmax: weights and coordinates of rows, powers
// of the coordinates, quotients. A thread for each row.
//
// REAL is float or double. Coordinate c of row i is x[c * rows + i].

typedef REAL real;

constexpr int THREADS = 128;

__device__ long long own_row()
{
    return 1ll * THREADS * blockIdx.x + threadIdx.x;
}

// Adds the offset and half of the squared length to line t of y, the logarithms of
// weights; `length` holds the squared lengths of the rows before the projection. Far
// keys get zero coordinates and no weight.
extern "C" __global__ __launch_bounds__(THREADS) void weigh(
    real* __restrict__ y, const real* __restrict__ length,
    const real* __restrict__ reach, real* __restrict__ weight, bool* __restrict__ far,
    long long rows, long long t, real offset, real longest, real largest)
{
    const long long i = own_row();
    if (i >= rows) {
        return;
    }
    real square = 0;
    for (long long c = 0; c < t; ++c) {
        square += y[c * rows + i] * y[c * rows + i];
    }
    const real size = sqrt(square), half = size / 2;
    const real log_weight = y[t * rows + i] + offset + square / 2;
    const real most = log_weight + size * (half > reach[0] ? half : reach[0]);
    // comparisons with NaN are false
    const bool near = length[i] <= longest && most <= largest;
    far[i] = !near;
    weight[i] = near ? exp(log_weight) : real(0);
    y[t * rows + i] = near ? log_weight : log(real(0));
    for (long long c = 0; c < t && !near; ++c) {
        y[c * rows + i] = 0;
    }
}

// marks the rows that are no outliers; outliers get zero coordinates
extern "C" __global__ __launch_bounds__(THREADS) void settle(
    real* __restrict__ x, const real* __restrict__ spread, bool* __restrict__ good,
    long long rows, long long t)
{
    const long long i = own_row();
    if (i >= rows) {
        return;
    }
    real energy = 0;
    for (long long c = 0; c < t; ++c) {
        energy += spread[c] * x[c * rows + i] * x[c * rows + i];
    }
    good[i] = energy <= 1;
    for (long long c = 0; c < t && !(energy <= 1); ++c) {
        x[c * rows + i] = 0;
    }
}

// Polynomials of single coordinates: line first[c] + a - 1 of the table is that of
// degree a, an orthonormal Hermite polynomial or a power over sqrt(a!). Blocks: rows,
// coordinates.
extern "C" __global__ __launch_bounds__(THREADS) void tabulate(
    const real* __restrict__ x, const int* __restrict__ first,
    real* __restrict__ table, long long rows, long long hermite)
{
    const long long i = own_row(), c = blockIdx.y;
    if (i >= rows) {
        return;
    }
    const real side = x[c * rows + i];
    const int degree = first[c + 1] - first[c];
    real older = 0, old = 1;
    for (int a = 1; a <= degree; ++a) {
        const real lower = hermite ? sqrt(real(a - 1)) * older : real(0);
        const real fresh = (side * old - lower) / sqrt(real(a));
        table[(first[c] + a - 1) * rows + i] = fresh;
        older = old;
        old = fresh;
    }
}

// Means of rows from their sums, (rows, p + 1), cut to the bounds, (2, p), and the
// logarithms of the sums of weights. A thread for each sum.
extern "C" __global__ __launch_bounds__(THREADS) void finish(
    const real* __restrict__ sums, const real* __restrict__ shift,
    const bool* __restrict__ good, const real* __restrict__ bounds,
    const real* __restrict__ middle, real* __restrict__ value,
    real* __restrict__ logarithm, long long rows, long long p, real least)
{
    const long long number = own_row(), i = number / (p + 1), c = number % (p + 1);
    if (i >= rows) {
        return;
    }
    const real total = sums[i * (p + 1) + p];
    const bool fine = good[i] && total > least && isfinite(total);
    if (c == p) {
        logarithm[i] = fine ? log(total) + shift[i] : log(real(-1));
        return;
    }
    real mean = 0;
    if (fine) {
        mean = sums[number] / total;
        mean = mean > bounds[c] ? mean : bounds[c];
        mean = mean < bounds[p + c] ? mean : bounds[p + c];
    }
    value[i * p + c] = mean + middle[c];
}
