// fuse_streams on the CPU: the entry points.
#include "native_backward.h"
#include "native_forward.h"

DGF_ENTRY(fuse_streams_forward, FuseStreamsArguments) {
  return arguments->bytes == sizeof(FuseStreamsArguments) ? forward(*arguments) : kOtherVersion;
}

DGF_ENTRY(fuse_streams_backward, FuseStreamsArguments) {
  return arguments->bytes == sizeof(FuseStreamsArguments) ? backward(*arguments) : kOtherVersion;
}
