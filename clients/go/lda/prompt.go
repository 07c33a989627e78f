package lda

import "github.com/lda-service/lda/clients/go/gen/ldav1"

// Text is a prompt of plain text, without a chat template.
func Text(text string) *ldav1.Prompt {
	return &ldav1.Prompt{Form: &ldav1.Prompt_Text{Text: text}}
}

// Chat is a conversation as a prompt, oldest turn first: lda.Chat(lda.Turn("user", "Who are you?")).
func Chat(turns ...*ldav1.ChatMessage) *ldav1.Prompt {
	return &ldav1.Prompt{Form: &ldav1.Prompt_Chat{Chat: &ldav1.Chat{Messages: turns}}}
}

// Turn is one turn of a conversation.
func Turn(role, content string) *ldav1.ChatMessage {
	return &ldav1.ChatMessage{Role: role, Content: content}
}

// Tokens is a prompt of token ids, used as they are.
func Tokens(ids ...uint32) *ldav1.Prompt {
	return &ldav1.Prompt{Form: &ldav1.Prompt_Tokens{Tokens: &ldav1.TokenIds{Ids: ids}}}
}
