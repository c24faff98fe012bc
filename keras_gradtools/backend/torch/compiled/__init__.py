"""Compiled functions on torch: a call is recorded while it runs, and later calls run the recorded operations only.

Most of the time that torch needs for small models is spent in Python: in Keras, in tapes, and in autograd. A recorded
call needs none of it. It runs the same operations of torch in the same order, so its results are equal bit for bit.

| file           | holds                                                                                  |
| -------------- | -------------------------------------------------------------------------------------- |
| `jit`          | compiled functions, their cached programs, and when a call runs eagerly                 |
| `recorder`     | the operations of one call, and what it reads                                           |
| `tensors`      | the tensors of one call: where each comes from, and which of them share memory          |
| `notices`      | what a recorder is told, because torch's modes do not see it                            |
| `operations`   | what a recorder must know about an operation of torch                                   |
| `leaks`        | calls that give values of tensors to Python                                             |
| `seeds`        | random generators that are seeded from tensors                                          |
| `logs`         | the logs of a training step, which a recorded step returns as tensors                  |
| `recorded_call` | what a recorder has seen of one call, and whether another call did the same          |
| `program`      | recorded operations as one Python function                                              |
| `bindings`     | the fastest way to call an operation                                                  |
| `inductor`     | recorded operations compiled by torch's own compiler                                   |
| `differentiable` | the gradient of results                                                              |
"""
