"""tiny-wan: a complete diffusers Wan pipeline in miniature, trained on procedural clips.

Because every clip is drawn from a caption by a formula, what the trained model draws can be scored
exactly: colour, shape, motion and background are measured from the pixels alone.

    clips            captioned scenes and their renderer
    detectors        colour, shape, motion and background of a video, by measurement
    architecture     the four models, the tokenizer and the scheduler
    whole_clip       the Wan VAE over a whole clip at once, equal to its frame-by-frame form
    compact_text     cross-attention over 512 text positions at the price of a few
    training         budgets, learning rates, checkpoints, compilation
    train_vae, train_denoiser, assemble, evaluate     the four stages, run by ``__main__``
    samples          drawn clips as a set that `turbo-opt calibrate` jobs learn from
    students         few-step and sparse students of the assembled model, by the jobs in jobs/
"""
