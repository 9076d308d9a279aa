// CUDA contexts, and the memory that belongs to them. The runtime works in a device's primary context, and so does this
// library, whatever context another library has made current: PyCUDA's autoinit, for one, makes a context of its own.
// The driver's functions are looked up when they are needed: nothing links to libcuda.
#pragma once

#include "neurogen/model.h"

struct CUctx_st;

namespace neurogen::cuda {

CUctx_st* primary_context(int device);  // kept for the life of the process
CUctx_st* current_context();            // of this thread, may be null
void set_current_context(CUctx_st* context);
Place find(const void* memory, int device);  // device: whose primary context `own_context` speaks of

}  // namespace neurogen::cuda
