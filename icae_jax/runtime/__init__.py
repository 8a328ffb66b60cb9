"""What training and inference need of the machine: devices, meshes, processes, the choice of
attention.
"""
