package lda.client;

import java.io.Serializable;

/**
 * One field that breaks a rule.
 *
 * @param field its path, such as {@code sampling.top_p}
 * @param description the rule in words
 */
public record Violation(String field, String description) implements Serializable {}
