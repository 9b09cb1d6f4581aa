"""`python -m experiments launch TARGET [options] -- COMMAND`: the same worker command on one machine or many.

A target is one file: local, ssh, tpu, gke or slurm. It starts COMMAND in every process and passes stop signals on, and
it starts the whole job again when a process dies. No launcher holds state: what a job has done is in its run folder,
and the same `launch` command continues it.
"""
