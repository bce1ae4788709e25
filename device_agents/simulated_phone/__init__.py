"""A phone as far as ADB can see, on a loopback port: for trying the android backend, and for its tests.

`protocol` frames what goes over the wire, `server` holds connections and streams, `services` are what a stream can ask
for, `sandbox` is the phone's file system and the place where its commands run, `phone` its state, `programs` what runs
models on it, and `control` changes it while it runs.
"""
