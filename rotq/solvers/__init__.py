"""From a weight, statistics of its inputs and a grid to codes: functions of tensors only."""
