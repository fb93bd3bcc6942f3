"""One pipeline behind HTTP: a bounded queue, cancel, health, metrics, a page. It knows no format.

A request passes these rooms, and what refuses it refuses it there:

    gate        key, host, origin, size of the body          before anything is parsed
    bodies      fields -> run.Request and how to deliver     a field that would be ignored is named
    admission   sizes, steps and memory                      before the model is touched
    line        the bounded queue and its one worker         429 when it is full
    engine      the pipeline: load, check, draw, unload      only ever on the worker's thread
    pictures    pixels -> bytes, and the shelf `url` points to

It needs the extra `serve`: pip install 'diffquant[serve]'.
"""
