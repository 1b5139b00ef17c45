// Downloads that are waited for later, each alone.
#pragma once

#include "ponder/backend.h"

namespace ponder::cuda {

void *mailbox(ponder_device *device, size_t size);
void drop_mailbox(ponder_device *device, void *mailbox);
int32_t send(ponder_device *device, void *mailbox, const void *buffer, size_t size);
int32_t receive(ponder_device *device, void *mailbox, void *host, size_t size);

} // namespace ponder::cuda
