// fork() copies the calling thread alone. The OpenMP runtime of GCC does not notice: the child would hand work to its
// parent's threads, which it does not have, and wait for them forever. So threads are given back before a fork; parent
// and child start new ones with their next call.
#include <omp.h>
#include <pthread.h>

#include "model.h"

namespace neurogen::cpu {
namespace {

void give_threads_back() {
  omp_pause_resource_all(omp_pause_soft);  // does nothing inside a parallel region, where no fork is legal
}

}  // namespace

void prepare_for_forks() {
  static const int registered = pthread_atfork(give_threads_back, nullptr, nullptr);
  (void)registered;
}

}  // namespace neurogen::cpu
