"""What the commands beside this folder share. A command says what is measured and why; everything else stands here.

    run.py            how a run begins and ends: arguments, an idle machine, conditions, files
    measure.py        contenders that take turns, medians; a clock for GPUs
    on_gpu.py         contenders on a GPU one after the other: wall, device time and memory of each
    memory.py         peak memory of one call, in a process of its own
    cases.py          the alignment loss: its shapes, inputs and contenders
    compare.py        any other operation: calls beside a floor, from a list of them to a finished command
    formulations.py   the alignment loss as it is written elsewhere, and its floor
    objectives.py     the same for the contrasts and the whole objective
    accuracy.py       errors against float64, and the gate: nothing that is wrong is timed
    ratios.py         what the times of the alignment loss say
    report.py         numbers, conditions and tables as text
    figures.py        what figure.py draws

Where to add

- a shape: ``CASES`` in cases.py, or the tuple at the top of the command.
- a formulation of the alignment loss in plain PyTorch: one ``Contender`` in ``IN_TORCH`` of cases.py. cpu.py, gpu.py,
  test_record.py, the gate, the tests and the figures take it from there (a colour of its own: ``STYLES``, figures.py).
- an implementation of ours: one ``Contender`` in ``CONTENDERS`` of cases.py for CPUs (its ``unavailable`` says why it
  cannot run), or in ``contenders`` of gpu.py for GPUs, CUDA kernels for instance.
- a contrast, such as one that leaves its own row out: one ``Comparison`` and one ``Check`` in contrast.py.
- another operation, such as joint scores: one module like contrast.py. The whole of it::

      # joint.py: joint scores on a CPU, forward + backward, beside the sums they are made of

      def calls(case):  # by name, the floor first
          xs = embeddings(case)
          return {"floor": ..., "native": step(ours, xs), "plain PyTorch": step(rival, xs)}

      def checks():  # each loss beside its float64 form
          xs = embeddings(Case(300, 64, 3))
          doubles = doubled(xs)
          return [Check("native", lambda: ours(xs), xs, lambda: rival(doubles), doubles)]

      def comparisons():
          return [Comparison("joint scores", (Case(1024, 512, 4),), calls)]

      if __name__ == "__main__":
          compare.main(__doc__, "joint", comparisons, checks, seconds=8.0)  # --quick, --force, --output; joint.json
"""
