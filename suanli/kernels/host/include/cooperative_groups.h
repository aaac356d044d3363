#error "cooperative groups are not executed on the CPU: use __syncthreads(), __syncwarp() and __shfl_sync()"
