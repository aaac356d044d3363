// CUDA programs include this for what a kernel has anyway.
#pragma once
