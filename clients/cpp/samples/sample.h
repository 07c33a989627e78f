// What the samples share: where the server is, and how a sample fails.
#ifndef LDA_SAMPLES_SAMPLE_H_
#define LDA_SAMPLES_SAMPLE_H_

#include <cstdlib>
#include <iostream>
#include <string>

inline std::string Target() {
  const char* target = std::getenv("LDA_TARGET");
  return target ? target : "127.0.0.1:50051";
}

// Unlike assert(), holds in release builds too.
inline void Require(bool holds, const std::string& promise) {
  if (holds) return;
  std::cerr << "not so: " << promise << std::endl;
  std::exit(1);
}

#endif  // LDA_SAMPLES_SAMPLE_H_
