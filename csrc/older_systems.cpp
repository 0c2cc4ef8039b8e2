// Symbols that newer compilers expect in libstdc++ and glibc, defined here: so GCC 12's code needs
// no more of a system than GCC 8's libstdc++ and glibc 2.28, as torch's own packages do
// (manylinux_2_28). csrc/exports.map keeps it all inside the library.

#include <new>
#include <sstream>

#if defined(__GLIBC__) && defined(__GLIBCXX__)

// glibc 2.32: whether the process has one thread, and counters need no atomic additions.
extern "C" {
char __libc_single_threaded = 0;
}

// GLIBCXX_3.4.29
namespace std {
void __throw_bad_array_new_length() { throw bad_array_new_length(); }
}  // namespace std

// GLIBCXX_3.4.26
template std::basic_stringstream<char>::basic_stringstream();
template std::basic_ostringstream<char>::basic_ostringstream();

#endif
