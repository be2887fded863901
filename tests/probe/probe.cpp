#include "probe.h"
#include <cerrno>
#include <cstddef>
#include <cstdlib>
#include <dlfcn.h>
#include <pthread.h>
#include <semaphore.h>

namespace kda::test {
namespace {

thread_local bool counting = false;
thread_local Counts counts;

} // namespace

Probe::Probe() {
  counts = {};
  counting = true;
}
Probe::~Probe() {
  counting = false;
}
Counts Probe::stop() {
  counting = false;
  return counts;
}

namespace {

void allocation() {
  if (counting) ++counts.allocations;
}
void lock() {
  if (counting) ++counts.locks;
}

/// The function that this one hides. Looked up on first use, without a guard: two threads find the same.
template <class F>
F* hidden(F*(&cached), const char* name) {
  if (cached == nullptr) cached = reinterpret_cast<F*>(dlsym(RTLD_NEXT, name));
  return cached;
}

} // namespace
} // namespace kda::test

using namespace kda::test;

// glibc's own names of the allocator: looking the others up would allocate.
extern "C" {
void* __libc_malloc(std::size_t);
void* __libc_calloc(std::size_t, std::size_t);
void* __libc_realloc(void*, std::size_t);
void* __libc_memalign(std::size_t, std::size_t);
void __libc_free(void*);

void* malloc(std::size_t bytes) {
  allocation();
  return __libc_malloc(bytes);
}
void* calloc(std::size_t count, std::size_t bytes) {
  allocation();
  return __libc_calloc(count, bytes);
}
void* realloc(void* old, std::size_t bytes) {
  allocation();
  return __libc_realloc(old, bytes);
}
void* memalign(std::size_t alignment, std::size_t bytes) {
  allocation();
  return __libc_memalign(alignment, bytes);
}
void* aligned_alloc(std::size_t alignment, std::size_t bytes) {
  return memalign(alignment, bytes);
}
int posix_memalign(void** out, std::size_t alignment, std::size_t bytes) {
  *out = memalign(alignment, bytes);
  return *out == nullptr ? ENOMEM : 0;
}
void free(void* p) {
  if (counting) ++counts.releases;
  __libc_free(p);
}

// Taking and waiting; giving back follows.
#define KDA_PROBE(name, parameters, arguments)                                                               \
  int name parameters {                                                                                      \
    static int(*function) parameters = nullptr;                                                              \
    lock();                                                                                                  \
    return hidden(function, #name) arguments;                                                                \
  }
KDA_PROBE(pthread_mutex_lock, (pthread_mutex_t * m), (m))
KDA_PROBE(pthread_mutex_trylock, (pthread_mutex_t * m), (m))
KDA_PROBE(pthread_mutex_timedlock, (pthread_mutex_t * m, const timespec* t), (m, t))
KDA_PROBE(pthread_rwlock_rdlock, (pthread_rwlock_t * m), (m))
KDA_PROBE(pthread_rwlock_tryrdlock, (pthread_rwlock_t * m), (m))
KDA_PROBE(pthread_rwlock_wrlock, (pthread_rwlock_t * m), (m))
KDA_PROBE(pthread_rwlock_trywrlock, (pthread_rwlock_t * m), (m))
KDA_PROBE(pthread_spin_lock, (pthread_spinlock_t * m), (m))
KDA_PROBE(pthread_cond_wait, (pthread_cond_t * c, pthread_mutex_t* m), (c, m))
KDA_PROBE(pthread_cond_signal, (pthread_cond_t * c), (c))
KDA_PROBE(pthread_cond_broadcast, (pthread_cond_t * c), (c))
KDA_PROBE(pthread_once, (pthread_once_t * o, void (*f)()), (o, f))
KDA_PROBE(sem_wait, (sem_t * s), (s))
KDA_PROBE(sem_post, (sem_t * s), (s))
#undef KDA_PROBE
}
